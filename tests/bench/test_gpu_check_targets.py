"""What gpu-check demands, of whom, and how a time is judged."""

from __future__ import annotations

import pytest
from gpu_check_tools import DRY, FULL, samples

from bench.ceilings import Work
from bench.gpu_check import cases, verdicts
from bench.gpu_check.cases import CHECKED, CUDA, PAGED, PEERS, TIMED, Target
from bench.gpu_check.setting import OURS, Setting
from bench.gpu_check.verdicts import floor, judge


def test_the_cases_are_those_with_targets() -> None:
    found = {t.name: {(x.text, x.least) for x in t.targets} for t in TIMED if t.targets}
    assert found == {
        "prefill B16 prompts1 P128 N1024 32/8 D128 causal": {
            ("SDPA flash on concatenated keys", 0.95), ("concatenation + SDPA flash", 1.3), ("FlexAttention", 1.0),
        },
        "prefill B64 prompts1 P64 N128 16/16 D64 causal": {("concatenation + the best SDPA", 1.5)},
        "train B16 prompts16 P128 N512 32/8 D128 causal": {("concatenation + the best SDPA", 1.2)},
        "decode B128 prompts8 P256 S512 32/8 D128": {
            ("copy bandwidth", 0.6), ("best peer that reads the prefix per row", 1.3),
            ("CUDA, copy bandwidth", 0.75), ("CUDA, best peer that reads the prefix per row", 1.5),
        },
        "decode B256 prompts256 P32 S128 32/8 D128": {("best peer", 1.0)},
        "decode B64 prompts1 P8192 S128 32/8 D128": {
            ("CUDA, decoding by row on shared pages", 10.0), ("CUDA, FlashInfer cascade", 1.1),
        },
        "decode B8 prompts8 P64 S256 32/8 D128": {("CUDA, best peer", 1.0), ("CUDA, 12 us", 1.0)},
    }  # fmt: skip
    assert len({t.name for t in TIMED}) == len(TIMED) and len({c.name for c in CHECKED}) == len(CHECKED)
    assert all(t.subject == PAGED for t in TIMED if t.case.queries == 1)


def test_patterns_match_whom_they_mean() -> None:
    peers = Target("", 1.0, PEERS)
    for name in ("sdpa flash", "concatenation + sdpa cudnn", "flex", "varlen", "flash-attn 3", "flashinfer cascade"):
        assert peers.matches(name)
    assert not any(peers.matches(name) for name in (OURS, PAGED, "ours, flash"))
    assert not Target("", 1.0, cases.BY_ROW).matches("flashinfer cascade")
    assert not Target("", 1.0, ("sdpa flash",)).matches("concatenation + sdpa flash")


def test_a_ratio_is_to_the_quickest_that_is_meant() -> None:
    timed = {OURS: samples(1.0, 1.0, 1.0), "sdpa flash": samples(1.4, 1.2, 1.3), "sdpa cudnn": samples(1.1, 1.6, 1.5)}
    over = Target("best", 1.2, ("sdpa *",))
    found = judge(over, OURS, timed, Work(1.0, 1.0), FULL)
    assert found == {"value": 1.3, "over": "sdpa flash", "met": True}
    assert judge(Target("best", 1.4, ("sdpa *",)), OURS, timed, Work(1, 1), FULL)["met"] is False
    assert judge(over, OURS, timed, Work(1, 1), DRY)["met"] is None  # a dry run judges nothing
    assert judge(Target("none", 1.0, ("flex",)), OURS, timed, Work(1, 1), FULL)["value"] is None
    assert judge(over, PAGED, timed, Work(1, 1), FULL)["met"] is None


def test_bandwidth_is_unique_bytes_over_time_and_ceiling() -> None:
    share = Target("copy bandwidth", 0.6)
    found = judge(share, OURS, {OURS: samples(1e-3)}, Work(0.0, 2.8e9), FULL)
    assert found["value"] == pytest.approx(0.7) and found["met"] is True
    assert judge(share, OURS, {OURS: samples(1e-3)}, Work(0.0, 2.8e9), Setting())["met"] is None


def test_a_time_is_a_target_too() -> None:
    target = Target("12 us", 1.0, subject=CUDA, seconds=12e-6)
    found = judge(target, CUDA, {CUDA: samples(10e-6, 9e-6, 16e-6)}, Work(0.0, 1.0), FULL)
    assert found == {"value": pytest.approx(1.2), "over": "12 us", "met": True}
    assert judge(target, CUDA, {OURS: samples(1.0)}, Work(0.0, 1.0), FULL)["met"] is None
    told: list[dict] = []
    verdicts.tell(TIMED[5], Work(1.0, 1.0), [], FULL, lambda kind, **values: told.append(values))
    missing = [x["over"] for x in told if "target" in x]
    assert missing == [f"{CUDA} was not timed"] * 2  # not ours by another kernel


def test_the_floor_is_the_higher_one_of_the_two() -> None:
    rates = {"memory": 1e12, "bf16": 1e14}
    assert floor(Work(1e11, 1e8), rates) == {"seconds": 1e-3, "bound": "compute"}
    assert floor(Work(1e9, 1e9), rates) == {"seconds": 1e-3, "bound": "memory"}
    assert floor(Work(1e11, 0.9e9), rates) == {"seconds": 1e-3, "bound": "both"}
    assert floor(Work(1e11, 1e9), {"memory": 1e12}) is None
