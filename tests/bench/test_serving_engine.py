"""The engine's benchmark runs, checks tokens before it shows a ratio, and judges nothing when it is quick."""


def test_every_case_runs(quick, capsys):
    status, lines = quick("serving-engine")
    checks = [line for line in lines if line["kind"] == "check"]
    assert status == 0 and {c["case"] for c in checks} == {"large", "small", "registry", "memory"}
    assert all(c["green"] and c["compared"] > 0 and c["worst"] == 0 for c in checks)
    assert {line["case"] for line in lines if line["kind"] == "ratio"} == {"large", "small", "registry", "memory"}
    assert all(line["met"] is None for line in lines if line["kind"] == "ratio")
    assert "MISSED" not in capsys.readouterr().out
