"""A run of gpu-check without a GPU: lines, time, processes that die, the report, and the dry run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from gpu_check_tools import DRY, FULL

from bench import __main__ as command
from bench.gpu_check import command as gpu_check
from bench.gpu_check import records, report, runner, sanitizer
from bench.gpu_check.budget import Budget
from bench.gpu_check.parts import BY_NAME, PARTS, Part
from bench.gpu_check.records import ERROR, GREEN, NOT_AVAILABLE, NOT_RUN, RED, NotAvailable
from bench.gpu_check.worker import work
from bench.measure import SCHEMA, CheckFailed
from fastprompt import costs


def test_lines_say_what_their_kind_has() -> None:
    good = {"schema": SCHEMA, "kind": "unit", "part": "a", "unit": "b", "state": GREEN, "seconds": 1.0, "detail": ""}
    assert records.parse(records.text(good)) == good
    for change, message in (
        ({"kind": "other"}, "kind is 'other'"), ({"schema": 0}, "schema is 0"), ({"state": "fine"}, "state is 'fine'"),
    ):  # fmt: skip
        assert message in (records.problem(good | change) or "")
    with pytest.raises(ValueError, match="a unit line lacks detail, seconds"):
        records.text({k: v for k, v in good.items() if k not in ("detail", "seconds")})


def test_a_part_is_as_bad_as_its_worst_unit() -> None:
    sets = ({GREEN, RED}, {RED, ERROR}, {GREEN, NOT_RUN}, {GREEN, NOT_AVAILABLE}, ())
    assert [records.together(states) for states in sets] == [RED, ERROR, NOT_RUN, GREEN, NOT_AVAILABLE]


def test_what_a_part_leaves_the_others_get() -> None:
    now = [0.0]
    budget = Budget(500.0, lambda: now[0])
    first, second, third = (Part(name, "", "", share) for name, share in (("a", 100), ("b", 50), ("c", 50)))
    assert budget.share(first, [second, third]) == pytest.approx(245)
    now[0] = 90.0
    assert budget.share(second, [third]) == pytest.approx(200)
    now[0] = 478.0
    assert budget.share(second, [third]) == pytest.approx(12)  # too little to share
    now[0] = 485.0
    assert budget.share(third, []) == 0.0


def test_the_default_time_is_below_nine_minutes() -> None:
    parser = argparse.ArgumentParser()
    gpu_check.add_arguments(parser)
    args = parser.parse_args([])
    assert args.minutes * 60 + runner._GRACE < 540 and args.part == [part.name for part in PARTS]
    for bad in (["--minutes", "0"], ["--minutes", "-1"], ["--part", "nothing"]):
        with pytest.raises(SystemExit):
            parser.parse_args(bad)


WORKER = """
import json, os, sys, time
request = json.loads(sys.stdin.read())
def say(kind, unit, **more):
    print(json.dumps({"schema": %d, "kind": kind, "part": request["part"], "unit": unit} | more), flush=True)
for unit in request["units"]:
    say("begin", unit)
    if unit == "crash": os.abort()
    if unit == "hang": time.sleep(600)
    if unit == "noise": print("nothing of ours", flush=True)
    state = "error" if unit == "lost" else "green"
    say("unit", unit, state=state, seconds=0.0, detail="")
    if unit == "lost": sys.exit(3)
"""


def driven(monkeypatch: pytest.MonkeyPatch, units: list[str], worker: str = WORKER % SCHEMA, **more) -> list[dict]:
    monkeypatch.setattr(runner, "_WORKER", (sys.executable, "-c", worker))
    lines: list[dict] = []
    part = Part("numerics", "numerics", "", 1, **more)
    runner.drive(part, units, DRY, 60.0, lines.append)
    assert all(records.problem(line) is None for line in lines)
    return lines


def test_a_process_that_dies_takes_one_unit_with_it(monkeypatch) -> None:
    lines = driven(monkeypatch, ["a", "crash", "b", "lost", "c", "noise"])
    states = {line["unit"]: line["state"] for line in lines if line["kind"] == "unit"}
    assert states == {"a": GREEN, "crash": ERROR, "b": GREEN, "lost": ERROR, "c": GREEN, "noise": GREEN}
    assert [line["unit"] for line in lines if line["kind"] == "unit"] == ["a", "crash", "b", "lost", "c", "noise"]
    assert "status -6" in next(line["detail"] for line in lines if line["unit"] == "crash")
    assert "nothing of ours" in next(line["text"] for line in lines if line["kind"] == "note")


def test_a_unit_that_hangs_is_stopped(monkeypatch) -> None:
    lines = driven(monkeypatch, ["hang", "b"], unit_seconds=1.0)
    assert [(line["unit"], line["state"]) for line in lines] == [("hang", ERROR), ("b", GREEN)]
    assert lines[0]["detail"] == "stopped: no word from it for 1 s"


def test_processes_side_by_side_do_every_unit_once(monkeypatch) -> None:
    units = [f"unit {i}" for i in range(7)]
    lines = driven(monkeypatch, units, processes=3)
    assert sorted(line["unit"] for line in lines) == units


def test_a_worker_that_cannot_start_ends(monkeypatch) -> None:
    lines = driven(monkeypatch, ["a", "b"], worker="raise SystemExit('no torch here')")
    assert [line["state"] for line in lines] == [ERROR, ERROR] and "no torch here" in lines[0]["detail"]


def test_without_time_nothing_runs_and_all_is_told(monkeypatch) -> None:
    lines: list[dict] = []
    runner.drive(PARTS[1], ["a", "b"], DRY, 0.0, lines.append)
    assert [(line["unit"], line["state"]) for line in lines] == [("a", NOT_RUN), ("b", NOT_RUN)]


def test_units_are_guarded(monkeypatch, tmp_path: Path) -> None:
    def run(unit, setting, emit) -> None:
        emit("note", text="here")
        if unit != "good":
            raise {"wrong": CheckFailed("off"), "absent": NotAvailable("no tool"), "bad": ValueError("odd")}[unit]

    monkeypatch.setattr(sanitizer, "run", run)
    with (tmp_path / "lines").open("w+") as out:
        assert work(BY_NAME["sanitizer"], ["good", "wrong", "absent", "bad"], DRY, 60.0, out) == 0
        assert work(BY_NAME["sanitizer"], ["late"], DRY, 0.0, out) == 0
        out.seek(0)
        lines = [records.parse(line) for line in out]
    found = [(line["unit"], line["state"]) for line in lines if line["kind"] == "unit"]
    assert found == [("good", GREEN), ("wrong", RED), ("absent", NOT_AVAILABLE), ("bad", ERROR), ("late", NOT_RUN)]
    assert "ValueError: odd (test_gpu_check_run.py:" in lines[-2]["detail"]
    assert all(line["part"] == "sanitizer" for line in lines if line["kind"] == "note")


def verdict(met: bool | None) -> dict:
    return {
        "kind": "verdict", "part": "micro", "unit": "a case", "target": "peer", "least": 1.0, "value": 0.9,
        "over": "flex", "met": met,
    }  # fmt: skip


def unit(state: str) -> dict:
    return {"kind": "unit", "part": "micro", "unit": "a case", "state": state, "seconds": 1.0, "detail": "because\nof"}


def test_status() -> None:
    assert not report.failed([unit(GREEN), unit(NOT_RUN), unit(NOT_AVAILABLE), verdict(True), verdict(None)])
    assert all(report.failed([line]) for line in (unit(RED), unit(ERROR), verdict(False)))


def test_the_table_names_what_is_missed_missing_and_not_run() -> None:
    peers = [{"kind": "peer", "part": "micro", "unit": "a case", "name": "flashinfer", "state": "not installed"}]
    peers += [peers[0] | {"name": "flex", "state": "error", "detail": "no room"}]
    shown = report.table([unit(NOT_RUN), verdict(False), *peers])
    assert "0.90" in shown and "MISSED" in shown
    assert "NOT RUN micro: a case: because" in shown
    assert "peer flex in a case: no room" in shown and "peers not installed: flashinfer" in shown
    assert report.progress(unit(RED)) == "  RED    micro: a case (1.0 s): because"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert command.main(["gpu-check"]) == gpu_check.NO_GPU
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_dry_run_goes_through_processes_and_writes_its_files(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run.jsonl"
    parts = ("ceilings", "sanitizer", "build", "costs")
    assert command.main(["gpu-check", "--dry-run", "--part", *parts, "--out", str(out)]) == 0
    lines = [records.parse(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in (lines[0], lines[-1])] == ["machine", "end"]
    assert lines[0]["benchmark"] == "gpu-check" and lines[0]["device"] == "cpu" and lines[0]["quick"]
    assert {line["what"] for line in lines if line["kind"] == "ceiling"} == {"memory", "bf16", "fp16", "fp32"}
    states = {line["unit"]: line["state"] for line in lines if line["kind"] == "unit"}
    assert states["memcheck"] == NOT_AVAILABLE and states["bf16"] == GREEN
    shown = capsys.readouterr().out
    assert "sanitizer  " in shown and "NOT AVAILABLE build" in shown
    table, usual = costs.load(tmp_path / "run.costs.json")  # as it can be given
    assert (table.device, table.measured, usual.device) == ("cpu", False, None)
    paths = [line["path"] for line in lines if line["kind"] == "cost"]
    assert paths.count("single") == 3 and paths.count("triton") == 1


def test_what_fails_costs_nothing_else(monkeypatch, tmp_path: Path, capsys) -> None:
    drive, out = runner.drive, tmp_path / "run.jsonl"

    def broken(part: Part, *more: object) -> None:
        if part.name == "ceilings":
            raise OSError("no more processes")
        drive(part, *more)

    monkeypatch.setattr(runner, "drive", broken)
    monkeypatch.setattr(gpu_check.plots, "draw", lambda *_: 1 / 0)
    assert command.main(["gpu-check", "--dry-run", "--part", "ceilings", "build", "--out", str(out)]) == 1
    lines = [records.parse(text) for text in out.read_text().splitlines()]
    states = {line["part"]: line["state"] for line in lines if line["kind"] == "part"}
    assert states == {"ceilings": ERROR, "build": NOT_AVAILABLE} and lines[-1]["kind"] == "end"
    assert "no pictures: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("part", [p.name for p in PARTS])
def test_every_part_names_its_units_once(part: str) -> None:
    for setting in (DRY, FULL):
        units = list(BY_NAME[part].units(setting))
        assert units and len(set(units)) == len(units)
