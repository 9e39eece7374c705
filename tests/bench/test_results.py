"""The schema, which every committed file of results satisfies, and what compares two runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import compare, machine, runs, schema
from bench.compare import TOLERANCE
from bench.measure import SCHEMA
from bench.runs import RESULTS, Run

FILES = sorted(RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_committed_results_satisfy_the_schema(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines and schema.problems(lines) == []
    assert not any(run.quick for run in runs.read(path))


def test_every_kind_is_documented() -> None:
    text = (Path(command.__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(schema.FORMS) <= {name.strip(" `") for row in rows for name in row.split(",")}


def machine_line(**more: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": "machine", "benchmark": "main-job", **machine.facts(), **more}


def line(kind: str, **values: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": kind, **values}


SPREAD = {"median": 2.0, "p20": 1.9, "p80": 2.1, "low": 1.8, "count": 5}
TIME = line("time", case="forward", name="fastprompt", wall=SPREAD, cpu=SPREAD)


def test_machine_facts_satisfy_it() -> None:
    assert schema.problem(machine_line(quick=True, plan={"seconds": 1.0})) is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (TIME | {"schema": 0}, "schema is 0"),
        (TIME | {"kind": "tme"}, "kind is 'tme'"),
        (TIME | {"case": 3}, "a time line: case is 3"),
        (TIME | {"extra": 3}, "a time line has extra too"),
        ({k: v for k, v in TIME.items() if k != "cpu"}, "a time line lacks cpu"),
        (TIME | {"wall": SPREAD | {"count": 1.5}}, "wall: count is 1.5"),
        (TIME | {"wall": SPREAD | {"median": True}}, "wall: median is True"),
        (TIME | {"wall": {}}, "wall lacks count, low, median, p20, p80"),
        (line("memory", samples=[[1, 2], ["x"]]), "samples: item 1: item 0 is 'x'"),
        (line("end", load=3), "load is 3"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], why: str) -> None:
    assert why in str(schema.problem(wrong))


def test_lines_belong_to_a_run() -> None:
    assert schema.problems([TIME]) == ["line 1: it comes before any machine line"]
    assert schema.problems([machine_line(), TIME]) == []
    gpu = machine_line(benchmark="gpu-check", quick=True, device="cuda", gpu=None, minutes=1, parts=[])
    assert schema.problems([gpu, line("note", part="micro", unit="x", text="y")]) == []
    assert (
        "kind is 'time'" not in schema.problems([gpu, TIME])[0]
        and "a time line lacks" in schema.problems([gpu, TIME])[0]
    )


def a_run(factors: dict[str, float], **more: Any) -> Run:
    """A run whose times are those of `SPREAD` by a factor a contestant."""
    lines = []
    for name, factor in factors.items():
        spread = {k: v if k == "count" else factor * v for k, v in SPREAD.items()}
        lines.append(TIME | {"name": name, "wall": spread, "cpu": spread})
    return Run(Path("x.jsonl"), machine_line(**more), lines)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ({"fastprompt": 1.0, "bare": 1.0, "peft": 1.0}, ""),
        ({"fastprompt": 1.5, "bare": 1.0, "peft": 1.0}, "SLOWER"),
        ({"fastprompt": 1.5, "bare": 1.5, "peft": 1.5}, ""),  # the machine was slower
        ({"fastprompt": 1.05, "bare": 1.0, "peft": 1.0}, ""),  # within the tolerance
        ({"fastprompt": 1.0, "bare": 0.5, "peft": 0.5}, ""),  # the peers became quicker, ours did not become slower
        ({"fastprompt": 0.6, "bare": 1.0, "peft": 1.0}, "quicker"),
    ],
)
def test_what_became_slower_is_flagged(new: dict[str, float], verdict: str) -> None:
    old = a_run(dict.fromkeys(new, 1.0))
    found = {change.name: change for change in compare.changes(old, a_run(new))}
    assert found["fastprompt"].verdict(TOLERANCE) == verdict
    assert found["bare"].verdict(TOLERANCE) == found["peft"].verdict(TOLERANCE) == ""  # peers are never flagged
    assert found["fastprompt"].ratio == pytest.approx(new["fastprompt"])


def test_a_rate_that_fell_is_slower() -> None:
    def at(rate: float) -> Run:
        spread = {k: v if k == "count" else rate * v for k, v in SPREAD.items()}
        load = line("load", kind_of_request="prompts", requests=1, errors=0, tokens_per_second=spread,
                    first_token_p50=0.1, first_token_p99=0.2, distinct=1)  # fmt: skip
        assert schema.problem(load) is None
        return Run(Path("x.jsonl"), machine_line(), [load])

    for rate, verdict in ((0.5, "SLOWER"), (1.0, ""), (2.0, "quicker")):
        (change,) = compare.changes(at(1.0), at(rate))
        assert change.verdict(TOLERANCE) == verdict


def test_wide_spreads_flag_nothing() -> None:
    old, new = a_run({"fastprompt": 1.0}), a_run({"fastprompt": 1.5})
    new.lines[0] = copy.deepcopy(new.lines[0])
    for clock in ("wall", "cpu"):
        new.lines[0][clock]["p20"] = 2.0
    (change,) = compare.changes(old, new)
    assert change.ratio == pytest.approx(1.5) and change.verdict(TOLERANCE) == ""


def write(path: Path, *found: Run) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for run in found for x in (run.machine, *run.lines)))
    return path


def test_comparing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.jsonl", a_run({"fastprompt": 1.0}))
    slower = write(tmp_path / "new.jsonl", a_run({"fastprompt": 1.0}), a_run({"fastprompt": 2.0}, time="9"))
    assert command.main(["compare", str(old), str(old)]) == 2  # a run is not compared to itself
    assert command.main(["compare", str(old), str(slower)]) == 1
    assert "fastprompt: 2.000x" in capsys.readouterr().out
    assert command.main(["compare", str(slower), str(slower)]) == 1  # its last two runs
    assert command.main(["compare", str(old), str(slower), "--tolerance", "1.5"]) == 0
    other = write(tmp_path / "other.jsonl", a_run({"fastprompt": 1.0}, benchmark="e2e"))
    assert command.main(["compare", str(old), str(other)]) == 2


def test_the_last_run_of_a_kind_of_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        a_run({"fastprompt": 1.0}, time="1"),
        a_run({"fastprompt": 2.0}, time="2"),
        a_run({"fastprompt": 9.0}, time="3", cpu="another"),
        a_run({"fastprompt": 9.0}, time="4", quick=True),
        a_run({"fastprompt": 9.0}, time="6"),  # later than what is compared
    ]
    monkeypatch.setattr(runs, "in_folder", lambda: known)
    said = compare.since_last(a_run({"fastprompt": 4.0}, time="5"))
    assert "main-job of 2" in said[0] and "2.000x" in said[1] and "SLOWER" in said[1]
    assert "none of ours moved" in compare.since_last(a_run({"fastprompt": 2.0}, time="5"))[0]
    assert compare.since_last(a_run({"fastprompt": 4.0}, time="5", quick=True)) == []
    assert compare.since_last(a_run({"fastprompt": 4.0}, time="5", cores=64)) == []


def test_runs_are_read_and_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", a_run({"bare": 1.0}), a_run({"bare": 2.0}))
    with path.open("a") as file:
        file.write('{"schema": 1, "kind": "ti')
    first, second = runs.read(path)
    assert [len(first.lines), len(second.lines)] == [1, 1] and second.lines[0]["wall"]["median"] == 4.0
