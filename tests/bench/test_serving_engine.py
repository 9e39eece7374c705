"""The engine's benchmark runs, checks tokens before it shows a ratio, and judges nothing when it is quick."""

import json
import os
from contextlib import contextmanager

from serving.http.conftest import Port

from bench import load_servers, registered_prompts, schema
from bench.__main__ import main
from bench.load_servers import Running
from bench.tenants import NAME
from fastprompt import demo
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.build import build_engine
from fastprompt.serving.http import create_app


def test_every_case_runs(quick, capsys):
    status, lines = quick("serving-engine")
    checks = [line for line in lines if line["kind"] == "check"]
    assert status == 0 and {c["case"] for c in checks} == {"large", "small", "registry", "memory"}
    assert all(c["green"] and c["compared"] > 0 and c["worst"] == 0 for c in checks)
    assert {line["case"] for line in lines if line["kind"] == "ratio"} == {"large", "small", "registry", "memory"}
    assert all(line["met"] is None for line in lines if line["kind"] == "ratio")
    assert "MISSED" not in capsys.readouterr().out


def test_fairness_runs_over_http(quick, capsys, monkeypatch):
    @contextmanager
    def in_a_thread(serve, folder, threads):
        engine = AsyncEngine(lambda: build_engine(demo.backbone(), folder / "prompts"), demo.tokenizer(), NAME)
        with Port(create_app(engine)) as port:
            yield Running(port.number, os.getpid())

    monkeypatch.setattr(load_servers, "server", in_a_thread)
    status, lines = quick("fairness")
    assert status == 0 and "MISSED" not in capsys.readouterr().out
    (check,) = [line for line in lines if line["kind"] == "check"]
    assert check["green"] and check["compared"] == 6
    loads = {line["kind_of_request"]: line for line in lines if line["kind"] == "load"}
    assert len(loads) == 5 and all(line["requests"] and not line["errors"] for line in loads.values())
    assert [line["met"] for line in lines if line["kind"] == "ratio"] == [None] * 3


def test_decoding_beside_a_refresh(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(registered_prompts, "_TURNS", 2)
    monkeypatch.setattr(registered_prompts, "_NEW", 9)
    assert main(["registered-prompts", "--part", "steps", "--names", "9", "30", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert schema.problems(lines) == []
    steps = {line["what"]: line for line in lines if line["kind"] == "pauses"}
    assert set(steps) == {"a step", "a step beside a refresh"}
    assert all(s["count"] == 9 and 0 < s["p50"] <= s["p99"] <= s["longest"] for s in steps.values())
