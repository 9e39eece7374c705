"""CUDA graphs of gpu-check, by a stand-in: recorded calls run again, into the same tensors."""

from __future__ import annotations

import types
from functools import partial

import pytest
import torch

from bench.gpu_check import cases, graphs, micro, timing, torch_peers
from bench.gpu_check.setting import Setting
from bench.measure import CheckFailed


def test_a_graph_replays_all_calls(monkeypatch) -> None:
    """Every set equally often, the result that of the last call."""
    made: list[int] = []

    def call(i: int) -> int:
        made.append(i)
        return i

    replay = types.SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "captured", lambda run: (replay, run()))
    monkeypatch.setattr(timing, "_look", lambda runs, device: 1e-4)
    timed = timing.graph([partial(call, i) for i in range(3)], "cuda", 1e-3)
    assert timed.calls == 12 and timed.result() == 2 and made == [0, 1, 2] * 4 and timed.ahead


class Pretended(Setting):
    """A run on the CPU that goes the ways of a GPU."""

    @property
    def on_gpu(self) -> bool:
        return True

    def chosen(self, op: str, dtype: torch.dtype) -> str:
        return "reference"


@pytest.fixture
def pretended(monkeypatch) -> Setting:
    """What only a GPU has does nothing; a recorded graph is run again by Python, into the same tensors."""

    def captured(run):
        result = run()

        def replay() -> None:
            for old, new in zip(micro.tensors(_listed(result)), micro.tensors(_listed(run())), strict=True):
                old.copy_(new)

        return types.SimpleNamespace(replay=replay), result

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch_peers, "_flex_compiled", lambda: torch_peers.baselines.sdpa)
    return Pretended("cpu", None, True, {"memory": 1e10, "bf16": 1e11})


def _listed(result):
    return list(result.values()) if isinstance(result, dict) else result


def test_all_modes_of_a_case(pretended: Setting) -> None:
    lines: list[dict] = []
    name = list(cases.timed(pretended))[3]
    micro.run(name, pretended, lambda kind, **values: lines.append({"kind": kind, **values}))
    modes = {(x["launch"], x["buffers"]) for x in lines if x["kind"] == "time" and x["name"] == cases.PAGED}
    assert modes == {("graph", "cold"), ("graph", "warm"), ("eager", "cold"), ("eager", "warm")}
    peers = {x["name"]: x["state"] for x in lines if x["kind"] == "peer"}
    assert peers["flex"] == "error"  # what stands in for it takes no block mask
    assert {x["over"] for x in lines if x["kind"] == "ratio"} >= {"sdpa flash", "concatenation + sdpa flash"}
    values = {x["target"]: x["value"] for x in lines if x["kind"] == "verdict"}
    assert [value for target, value in values.items() if target.startswith("CUDA")] == [None, None]  # it does not run
    assert len(values) == 4 and all(value > 0 for value in values.values() if value is not None)


def test_a_result_that_a_replay_does_not_write_is_red(pretended: Setting, monkeypatch) -> None:
    usual = timing.captured
    monkeypatch.setattr(timing, "captured", lambda run: (types.SimpleNamespace(replay=lambda: None), usual(run)[1]))
    with pytest.raises(CheckFailed, match=r"ours.*off by nan"):
        micro.run(next(iter(cases.timed(pretended))), pretended, lambda *a, **k: None)


@pytest.mark.parametrize("name", graphs._CALLS)
def test_replays_take_other_inputs(name: str, pretended: Setting) -> None:
    graphs.run(f"CUDA graph: {name}", pretended, lambda *a, **k: None)


def test_a_graph_that_keeps_old_results_is_red(pretended: Setting, monkeypatch) -> None:
    monkeypatch.setattr(timing, "captured", lambda run: (types.SimpleNamespace(replay=lambda: None), run()))
    with pytest.raises(CheckFailed, match="output 0 has other bits"):
        graphs.run("CUDA graph: merge_states", pretended, lambda *a, **k: None)
