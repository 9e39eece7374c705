"""The units of gpu-check, run without a GPU: what is wrong is red, what fails fails alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from gpu_check_tools import DRY, run_unit

from bench import checkout
from bench.attention_inputs import build
from bench.gpu_check import calls, cases, graphs, grid, micro, numerics, plots, sanitizer
from bench.gpu_check.cases import TIMED
from bench.gpu_check.records import NotAvailable
from bench.gpu_check.setting import OURS, Setting
from bench.gpu_check.timing import Timed, interleave
from bench.measure import CheckFailed


@pytest.mark.parametrize("name", [n for n in numerics.units(DRY) if "timed" not in n][::7])
def test_numerics(name: str) -> None:
    found = run_unit(numerics, name)
    assert [line["who"] for line in found if line["kind"] == "check"] == ["reference"]
    assert all(0 <= share <= 4 for line in found for share in line["errors"].values())


def test_a_wrong_kernel_is_red(monkeypatch) -> None:
    call = grid.GRID["grouped_linear odd size"](torch.float16)
    right = calls.Right.of(call)
    good = call.oracle()
    right.errors(good)
    for name, x in good.items():
        flat = x.clone().flatten()
        flat[int(flat.isfinite().nonzero()[-1])] += 8 * right.bound[name]
        with pytest.raises(CheckFailed, match=f"{name} is off"):
            right.errors(good | {name: flat.view(x.shape)})
        with pytest.raises(CheckFailed, match=f"{name} is not finite"):
            right.errors(good | {name: torch.full_like(x, torch.nan)})
    values = iter(range(100))
    monkeypatch.setattr(calls.Call, "ours", lambda self, impl: {n: x + next(values) * 1e-6 for n, x in good.items()})
    with pytest.raises(CheckFailed, match="differs between runs"):
        run_unit(numerics, "grouped_linear odd size, fp16")


def test_what_is_not_written_is_seen() -> None:
    with numerics.poisoned():
        assert torch.empty(7).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", list(cases.timed(DRY))[2:4])
def test_micro(name: str) -> None:
    lines = run_unit(micro, name, Setting("cpu", "reference", True, {"memory": 1e10, "bf16": 1e11}))
    subject = cases.timed(DRY)[name].subject
    times = {(line["name"], line["launch"], line["buffers"]) for line in lines if line["kind"] == "time"}
    assert {(subject, "eager", "cold"), (subject, "eager", "warm"), ("sdpa math", "eager", "cold")} <= times
    ratios = [line for line in lines if line["kind"] == "ratio"]
    assert ratios and all(line["under"] == subject for line in ratios)
    verdicts = [line for line in lines if line["kind"] == "verdict"]
    assert len(verdicts) >= len(cases.timed(DRY)[name].targets) and all(line["met"] is None for line in verdicts)
    assert [line["kind"] for line in lines].index("check") < [line["kind"] for line in lines].index("time")


def test_no_time_of_ours_that_is_wrong(monkeypatch) -> None:
    from bench import attention_baselines

    usual = attention_baselines.prefix_attention
    monkeypatch.setattr(attention_baselines, "prefix_attention", lambda *a, **k: usual(*a, **k) + 1)
    with pytest.raises(CheckFailed, match="ours"):
        run_unit(micro, next(iter(cases.timed(DRY))))


def test_a_peer_that_fails_fails_alone(monkeypatch) -> None:
    from bench.gpu_check import torch_peers

    monkeypatch.setattr(torch_peers, "_ready", lambda *a: 1 / 0)
    lines = run_unit(micro, list(cases.timed(DRY))[1])
    assert [(x["name"], x["state"]) for x in lines if x["kind"] == "peer"] == [("sdpa math", "error")]
    assert {x["name"] for x in lines if x["kind"] == "time"} == {OURS, "concatenation + sdpa math"}


def test_graphs() -> None:
    units = graphs.units(DRY)
    for name in (units[1], units[3], units[-1]):
        assert run_unit(graphs, name) == []
    call = grid.GRID["prefix_attention causal"](torch.bfloat16)
    other = graphs._other_extents(call, 1)
    assert not torch.equal(call.tensors["prefix_start"], other.tensors["prefix_start"])
    assert other.oracle()["out"].isfinite().all()  # nobody reads the poison
    found = graphs._grads(call, "reference", {})
    assert {"output 0", "output 1", "dq", "dprefix_k"} <= found.keys() and found["dq"].isfinite().all()


def test_what_the_sanitizer_says() -> None:
    watched = '{"state": "green"}\n========= ERROR SUMMARY: 0 errors\n'
    sanitizer.judge("memcheck", 0, watched)
    assert sanitizer.summary(watched) == "ERROR SUMMARY: 0 errors"
    with pytest.raises(CheckFailed, match=r"memcheck: =+ Invalid __global__ read"):
        sanitizer.judge("memcheck", 86, "noise\n========= Invalid __global__ read of size 2\n")
    with pytest.raises(NotAvailable, match="does not run on this machine"):
        sanitizer.judge("memcheck", 1, "========= Error: Device not supported\n")
    for status, text in ((1, watched), (0, '{"state": "red"}')):
        with pytest.raises(RuntimeError, match="ended with status"):
            sanitizer.judge("racecheck", status, text)
    sanitizer.run("one process", DRY, print)


def test_decoding_in_graphs_is_compared_to_the_bare_backbone() -> None:
    from bench.gpu_check import end_to_end

    lines = run_unit(end_to_end, "decode in graphs")
    assert [(x["over"], x["under"]) for x in lines if x["kind"] == "ratio"] == [("bare", "ours")]
    (verdict,) = (x for x in lines if x["kind"] == "verdict")
    assert verdict["least"] == 0.97 and verdict["met"] is None
    assert all(share <= 4 for x in lines if x["kind"] == "check" for share in x["errors"].values())


@pytest.mark.parametrize("name", ["forward, mixed", "train", "together 16", "generate"])
def test_end_to_end(name: str) -> None:
    from bench.gpu_check import end_to_end

    lines = run_unit(end_to_end, name)
    assert [line for line in lines if line["kind"] == "peer"] == []
    assert all(share <= 4 for line in lines if line["kind"] == "check" for share in line["errors"].values())
    pairs = {tuple(x.rpartition(": ")[2] for x in (r["over"], r["under"])) for r in lines if r["kind"] == "ratio"}
    more = {("bare, in parts", "bare")} if name.startswith("together") else set()
    assert pairs == {("peft", "ours"), ("bare", "ours")} | more


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = run_unit(micro, list(cases.timed(DRY))[1], Setting("cpu", "reference", True, {"memory": 1e9, "bf16": 1e9}))
    drawn = plots.draw([line | {"part": "micro"} for line in lines], tmp_path / "run")
    assert [path.name for path in drawn] == ["run-times.svg", "run-targets.svg"]
    assert all("<svg" in path.read_text() for path in drawn)
    assert plots.draw([], tmp_path / "none") == []


def test_turns_and_calls() -> None:
    order: list[str] = []

    def timed(name: str) -> Timed:
        return Timed(lambda: order.append(name), 4, lambda: None)

    found = interleave({"a": timed("a"), "b": timed("b")}, 3, "cpu")
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]  # a warm-up, then turns
    assert [s.round for s in found["a"]] == [0, 1, 2]


def test_a_checkout_finds_its_kernels(monkeypatch) -> None:
    name = "fastprompt._triton"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda _: None)
    checkout.find_kernels()
    assert Path(sys.modules[name].__path__[0]) == checkout.ROOT / "kernels" / "triton"
    monkeypatch.delitem(sys.modules, name)


def test_inputs_are_the_same_for_a_seed_on_a_device() -> None:
    case = TIMED[3].shrunk().case
    one, two = build(case, "bf16"), build(case, "bf16", device="cpu")
    assert torch.equal(one.q, two.q) and one.to("cpu").plan is one.plan
    assert json.dumps(DRY.request())
