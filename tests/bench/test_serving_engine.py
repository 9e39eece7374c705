"""The engine's benchmark runs, checks tokens before it shows a ratio, and judges nothing when it is quick."""

import json

from bench.__main__ import main


def test_every_case_runs(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    assert main(["serving-engine", "--quick", "--threads", "1", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    checks = [line for line in lines if line["kind"] == "check"]
    assert {c["case"] for c in checks} == {"large", "small", "registry", "memory"}
    assert all(c["green"] and c["compared"] > 0 and c["worst"] == 0 for c in checks)
    assert {line["case"] for line in lines if line["kind"] == "ratio"} == {"large", "small", "registry", "memory"}
    assert all(line["met"] is None for line in lines if line["kind"] == "ratio")
    assert "MISSED" not in capsys.readouterr().out
