"""Fitted exponents, the sweep and `e2e` from end to end, the pictures, and `fastprompt bench`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import __main__ as command
from bench import e2e, laws, plot, runs, schema, sweep
from bench.laws import LAWS, REGION
from fastprompt.cli import app


def test_an_exact_law_is_found() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    found = laws.fit(x, [3 * v**1.5 for v in x])
    assert found is not None and found.exponent == pytest.approx(1.5) and found.error == pytest.approx(0, abs=1e-9)
    assert (found.points, found.first, found.last) == (4, 1.0, 8.0)


def test_the_error_is_that_of_least_squares() -> None:
    chance = random.Random(0)
    x = [float(2**i) for i in range(9)]
    y = [v**0.7 * math.exp(chance.gauss(0, 0.1)) for v in x]
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
    left = np.log(y) - np.polyval(np.polyfit(np.log(x), np.log(y), 1), np.log(x))
    found = laws.fit(x, y)
    assert found is not None and found.exponent == pytest.approx(slope)
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0] * (left**2).sum() / 7))


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 4], [0, 1, 2]), ([1, 2, 4], [1, -1, 2])])
def test_what_has_no_exponent_gets_none(x: list[float], y: list[float]) -> None:
    assert laws.fit(x, y) is None


def test_the_large_end_is_the_upper_half_of_at_least_four_points() -> None:
    assert [laws.large_end(range(n)) for n in (3, 4, 5, 7, 8, 9)] == [0, 0, 1, 3, 4, 4]


def test_a_law_changes_one_size_and_the_region_two() -> None:
    for law in LAWS:
        sizes = [(c.rows, c.prompts, c.prefix, c.keys) for c in law.points.values()]
        moving = [i for i in range(4) if len({s[i] for s in sizes}) > 1]
        assert len(moving) == 1 and [s[moving[0]] for s in sizes] == list(law.points)
        assert len(law.points) >= 5
    for (virtual, each), case in REGION.items():
        assert case.prefix == virtual and case.rows == case.prompts * each == 32


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick sweep and a quick `micro`, marked as if they were whole, in a folder."""
    folder = tmp_path_factory.mktemp("results")
    quick = ["--quick", "--threads", "1", "--out", str(folder / "all.jsonl")]
    assert command.main(["sweep", *quick, "--rounds", "1"]) == 0
    assert command.main(["micro", *quick, "--op", "merge_states", "embed_prompts"]) == 0
    text = (folder / "all.jsonl").read_text()
    (folder / "all.jsonl").write_text(text.replace('"quick": true', '"quick": false'))
    return folder


def test_a_quick_sweep(swept: Path) -> None:
    lines = [json.loads(line) for line in (swept / "all.jsonl").read_text().splitlines()]
    assert schema.problems(lines) == []
    run = runs.read(swept / "all.jsonl")[0]
    assert {p["law"] for p in run.of("point")} == set(sweep.NAMES)
    fits = {(f["law"], f["name"], f["quantity"], f["part"]) for f in run.of("fit")}
    for law in LAWS:
        assert {(law.name, name, q, p) for name in ("ours", "expanded") for q in ("seconds", "bytes")
                for p in ("all", "large")} <= fits  # fmt: skip
    assert ("prompts in the bank", "bank", "bytes", "all") in fits
    for point in run.of("point"):
        if point["law"] == "region":
            assert [r["over"] for r in point["ratios"]] == ["folded", "single pass"]


def test_pictures_are_the_same_on_every_run(swept: Path, tmp_path: Path) -> None:
    for to in ("one", "two"):
        assert command.main(["plot", "--results", str(swept), "--to", str(tmp_path / to)]) == 0
    for name in plot.PICTURES:
        one, two = ((tmp_path / to / name).read_bytes() for to in ("one", "two"))
        assert one == two and b"all.jsonl" in one and b"dc:date" not in one


def test_plotting_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plot", "--results", str(tmp_path), "--to", str(tmp_path / "img")]) == 1
    assert "no run of sweep" in capsys.readouterr().err


@pytest.mark.parametrize("name", plot.PICTURES)
def test_committed_pictures_are_of_the_last_results(name: str) -> None:
    last = runs.latest(runs.in_folder(), plot.PICTURES[name][0])
    assert last is not None and plot.source(last) in (plot.FOLDER / name).read_text()


def test_quick_e2e(quick: Callable) -> None:
    status, lines = quick("e2e", "--rounds", "1")
    assert status == 0 and lines[0]["benchmark"] == "e2e"
    ratios = [line for line in lines if line["kind"] == "ratio"]
    assert {line["case"] for line in ratios} == set(e2e.CASES) and all(line["met"] is None for line in ratios)


@pytest.mark.parametrize("arguments", [["--help"], ["micro", "--list", "--op", "merge_states"]])
def test_fastprompt_bench_passes_everything_on(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 0, done.output


def test_fastprompt_bench_has_the_status_of_the_benchmark() -> None:
    assert CliRunner().invoke(app, ["bench", "micro", "--cases", "no such case"]).exit_code == 1
    assert CliRunner().invoke(app, ["bench", "no-such-benchmark"]).exit_code == 2


def test_fastprompt_bench_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = __import__("importlib").import_module("fastprompt.cli.bench")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site" / "fastprompt" / "cli" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "micro"])
    assert done.exit_code == 1 and "no bench folder" in done.output
