"""The cost table that gpu-check measures, and the extension that it builds, as far as they go without a GPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import checkout
from bench.gpu_check import cost_table, extension, grid
from bench.gpu_check.cost_table import Point
from bench.gpu_check.records import NotAvailable
from bench.gpu_check.setting import Setting
from fastprompt import costs
from fastprompt.costs import Decode, Table, Weights

DRY = Setting("cpu", "reference", True, {"memory": 1e10})
RATE = 4.8e12
TRUE = Weights(2.5, 1.2, 0.4, 1.7)


def points(path: str, weights: Weights, shapes: Sequence[Decode] = cost_table.SHAPES) -> list[Point]:
    """What a path with these weights would take."""
    (counted,) = costs.load()
    table = replace(counted, paths={path: weights})
    works = [shape.work(path, path != "single") for shape in shapes]
    return [Point(path, work, table.microseconds(path, work) / 1e6) for work in works]


def test_the_weights_that_times_were_made_of_are_found() -> None:
    for path in costs.PATHS:
        found: dict[str, float] = {}
        assert cost_table.fit(points(path, TRUE), RATE, found) < 1e-9
        want = (2.5, 1.2, 0.4, 1.7)
        assert tuple(found.values()) == pytest.approx(want, rel=1e-6)
        assert list(found) == ["launch_us", "unique", "again", "states"]


def test_no_weight_is_negative() -> None:
    some = [replace(p, seconds=p.seconds / 2 + 1e-5) for p in points("triton", Weights(0.0, 1.0, 0.0, 0.1))]
    found: dict[str, float] = {}
    cost_table.fit(some, RATE, found)
    assert min(found.values()) >= 0


def test_an_entry_is_a_table_and_says_what_was_not_measured() -> None:
    full = Setting("cpu", None, False)
    measured = points("triton", TRUE) + points("single", TRUE)
    entry = cost_table.entry(measured, RATE, "A GPU", full)
    table = Table.parse(json.loads(json.dumps(entry)))
    (counted,) = costs.load()
    assert table.measured and table.device == "A GPU" and table.memory_gbs == RATE / 1e9
    assert table.paths["cuda"] == counted.paths["cuda"] and table.source.endswith("cuda: counted")
    assert table.paths["triton"].again == pytest.approx(0.4)
    assert cost_table.entry(points("cuda", TRUE), RATE, "", full)["source"].endswith("triton, single: counted")
    assert table.state_tokens == round(3 * 2 * 32 * 129 * 4 * 1.7 / (4096 * 0.4))
    assert cost_table.sharing({"again": 0.0, "states": 1.0, "launch_us": 1.0}, RATE)["state_tokens"] == 2**30


def test_what_is_measured_when_the_time_ends_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def found(shape, _):
        return points("cuda", TRUE, [shape]) + points("single", TRUE, [shape])

    monkeypatch.setattr(cost_table, "measured", found)
    cost_table.run("decoding", Setting("cpu", None, False, {"memory": RATE}), lambda kind, **_: told.append(kind))
    assert told.index("table") == 10 and told.count("table") == len(cost_table.SHAPES) - 4 and told[-1] == "table"


def test_some_shapes_share_and_some_do_not() -> None:
    for shapes in (cost_table.SHAPES, cost_table.QUICK):
        assert {cost_table.shares(shape) for shape in shapes} == {True, False}
    assert Decode(128, 8, 256, 512) in cost_table.SHAPES


def test_without_a_copy_rate_there_is_no_table() -> None:
    told: list[str] = []
    cost_table.run("decoding", replace(DRY, rates={}), lambda kind, **values: told.append(kind))
    assert told == ["cost"] * 4 + ["note"]


# the extension


@pytest.mark.parametrize(("capability", "want"), [((9, 0), "90a"), ((8, 0), "80"), ((10, 0), "100"), ((12, 0), "120")])
def test_it_is_built_for_the_gpu_that_is_there(capability: tuple[int, int], want: str) -> None:
    assert extension.arch(capability) == want


def test_what_its_build_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []

    def answer(status: int, text: str) -> None:
        def run(command: list[str], **more: object) -> SimpleNamespace:
            asked.append((command, more))
            return SimpleNamespace(returncode=status, stdout="", stderr=text)

        monkeypatch.setattr(subprocess, "run", run)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(extension.dispatch, "obstacle", lambda op, impl: "not built")
    notes: list[str] = []

    def build():
        return extension.run("", Setting("cuda"), lambda kind, **v: notes.append(v["text"]))

    answer(0, "")
    build()
    assert notes == ["built for sm_90a"] and asked[0][1]["env"]["FASTPROMPT_BUILD"] == "cuda"
    assert asked[0][0][-2:] == ["--build-lib", str(checkout.BUILT)]
    answer(1, "FASTPROMPT_BUILD=cuda, but there is no CUDA compiler (x)")
    with pytest.raises(NotAvailable, match="no CUDA compiler"):
        build()
    answer(1, "error: it is wrong")
    with pytest.raises(RuntimeError, match="it is wrong"):
        build()
    monkeypatch.setattr(extension.dispatch, "obstacle", lambda op, impl: None)
    build()
    assert notes[-1] == "CUDA kernels are installed already"
    with pytest.raises(NotAvailable, match="no GPU"):
        extension.run("", DRY, print)


def test_a_checkout_finds_what_was_built() -> None:
    import fastprompt

    checkout.find_extensions()
    checkout.find_extensions()
    assert fastprompt.__path__.count(str(checkout.BUILT / "fastprompt")) == 1


def test_decoding_calls_have_rows_of_one_query_only() -> None:
    for name in grid.DECODING:
        call = grid.GRID[name](torch.float16)
        assert set(call.queries) == {1} and call.plan()["plan"].decoding is not None, name
    assert len(grid.DECODING) == 6
