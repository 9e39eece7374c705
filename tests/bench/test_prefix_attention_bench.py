"""The benchmark of prefix attention: its cases, its baselines, its judgement, and it all from end to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import __main__ as command
from bench import attention_baselines as baselines
from bench import attention_run, ceilings, measure, memory, op_run, prefix_attention_memory
from bench.attention_cases import GRID, SETS, TABLE, Case
from bench.attention_check import truth
from bench.attention_inputs import build
from bench.ceilings import Ceiling, Ceilings, Share, Work
from bench.measure import CheckFailed, Contestant, Ratio, Sample, Spread

LIMITS = Ceilings(Ceiling(1e10, "reads", True), {"fp32": Ceiling(1e11, "products", True)})
SETTINGS = op_run.Settings("reference", "wall", LIMITS, 2, None, quick=False)
SHRUNK = {case.shrunk().name: case.shrunk() for case in TABLE + GRID}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def ratio(median: float, quiet: bool = True, over: str = "concatenated") -> Ratio:
    return Ratio(over, "ours", Spread.of([median]), Spread.of([99.0]), quiet)


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in TABLE + GRID]
    assert len(set(names)) == len(names) - len({c.name for c in TABLE} & {c.name for c in GRID})
    assert len(TABLE) == 10 and all(case.judged for case in TABLE)
    assert SETS["all"] == TABLE + GRID


def test_the_grid_holds_every_kind_of_shape() -> None:
    assert {c.heads for c in GRID} >= {(12, 12), (16, 16), (16, 4), (32, 8), (32, 2), (8, 1)}
    assert {c.dim for c in GRID} >= {32, 64, 80, 96, 128, 256}
    assert {c.prefix for c in GRID} >= {0, 1, 16, 64, 100, 128, 512, 2048}
    assert {c.queries for c in GRID} >= {1, 2, 4, 8, 16, 64, 128, 512}
    assert {c.keys for c in GRID} >= {1, 64, 512, 2048}
    assert {min(c.rows, 128) for c in GRID} >= {1, 8, 32, 128}
    assert any(1 < c.prompts < c.rows for c in GRID) and any(1 < c.prompts == c.rows for c in GRID)
    for flag in ("ragged", "strided", "padded", "window", "backward"):
        assert any(getattr(c, flag) for c in GRID), flag


@pytest.mark.parametrize("case", [*TABLE, *GRID], ids=lambda c: c.name)
def test_rows_read_every_prompt(case: Case) -> None:
    lengths, prompts = case.lengths(), case.prompt_of()
    assert len(prompts) == case.rows and set(prompts) <= set(range(case.prompts))
    assert case.ragged or set(prompts) == set(range(case.prompts))
    assert lengths[0] == case.prefix and all(0 < n <= case.prefix or case.prefix == 0 for n in lengths)
    assert not case.ragged or len(set(lengths)) == len(lengths)
    assert all(0 <= first < case.keys for first in case.first_keys())


def test_targets_are_those_of_the_case_or_one() -> None:
    first = TABLE[0]
    assert [first.least("concatenated", d) for d in ("fp32", "bf16", "fp16")] == [2.2, 4.0, 1.0]
    assert first.least("expanded", "bf16") == 4.2 and first.least("reference", "bf16") == 1.0


@pytest.mark.parametrize("case", SHRUNK.values(), ids=SHRUNK)
def test_all_contestants_compute_the_same(case: Case) -> None:
    inputs = build(case, "fp32")
    right = truth(case, inputs)
    forms = baselines.forms(case, inputs.mask, torch.float32)
    entries = [baselines.concatenated(case, form) for form in forms]
    entries += [baselines.expanded(case, form) for form in forms if form.repeats == 1]
    entries += [entry for entry in (baselines.folded(case, inputs),) if entry]
    for entry in (*entries, baselines.ours(case, "reference")):
        found = entry.named(entry.build(inputs)())
        assert found.keys() >= {"out", "dq"} if case.backward else found.keys() == {"out"}
        right.errors(entry.about, found, slack=8.0)  # so few numbers make the bound a matter of luck


@pytest.mark.parametrize("case", [SHRUNK[n] for n in list(SHRUNK)[::5]], ids=list(SHRUNK)[::5])
def test_truth_in_parts_is_truth(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = build(case, "fp32")
    whole = truth(case, inputs).exact
    monkeypatch.setattr("bench.attention_check._ELEMENTS", 1)
    assert len(list(inputs.parts(1))) == case.rows * case.heads[1]
    parts = truth(case, inputs).exact
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-10, atol=1e-12)


def test_a_wrong_result_is_caught() -> None:
    case = TABLE[0].shrunk()
    inputs = build(case, "fp32")
    right = truth(case, inputs)
    good = right.exact["out"].float()
    right.errors("good", {"out": good})
    late = good.clone()
    late[-1, -1, -1, -1] += 1e-4
    for bad in (late, torch.full_like(good, torch.nan), good[:1]):
        with pytest.raises(CheckFailed, match="bad: out"):
            right.errors("bad", {"out": bad})


def test_copies_keep_numbers_and_layout() -> None:
    case = next(c for c in GRID if c.strided and c.padded).shrunk()
    one = build(case, "bf16")
    other = one.copy()
    for name in ("q", "k", "v", "prefix_k", "prefix_v", "start", "length", "first"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        assert mine.data_ptr() != theirs.data_ptr()
    assert one.q.stride()[1] == case.dim  # heads after tokens


def test_work_counts_visible_pairs_and_unique_bytes() -> None:
    case = Case(3, 1, 4, 5, 5, (2, 1), 8)
    pairs = 3 * (5 * 4 + 15)
    values = 3 * 5 * 2 * 8 * 2 + 2 * 8 * (3 * 5 + 4)
    assert ceilings.work(case, build(case, "bf16")) == Work(4 * 8 * 2 * pairs, 2 * values)
    shared, apart = (ceilings.work(replace(case, prompts=n), build(replace(case, prompts=n), "bf16")) for n in (1, 3))
    assert (apart.flops, apart.bytes) == (shared.flops, shared.bytes + 2 * 2 * 8 * 2 * 4)
    window = replace(case, queries=1, window=3)
    assert ceilings.work(window, build(window, "fp32")).flops == 4 * 8 * 2 * 3 * 3


def test_the_share_is_of_the_ceiling_that_binds() -> None:
    memory = ceilings.share(Work(1e6, 1e6), 2e-4, LIMITS, "fp32")
    assert (memory.bound, memory.floor) == ("memory", 1e-4)
    assert math.isclose(memory.share, 0.5) and math.isclose(memory.gbs, 5.0) and math.isclose(memory.gflops, 5.0)
    assert ceilings.share(Work(1e8, 1e6), 2e-3, LIMITS, "fp32").bound == "compute"
    assert ceilings.share(Work(1.5e7, 1e6), 2e-4, LIMITS, "fp32").bound == "both"


def test_ceilings_are_of_this_machine() -> None:
    found = ceilings.of_machine(["fp32", "fp16"], "cpu", quick=True)
    assert found.memory.rate > 1e8
    assert found.matrix["fp16"].rate >= found.matrix["fp32"].rate > 1e6  # a kernel may convert


@pytest.mark.parametrize(
    ("median", "quiet", "clock", "quick", "met"),
    [
        (2.3, True, "wall", False, True),
        (2.1, True, "wall", False, False),
        (9.0, False, "wall", False, None),
        (1.0, False, "cpu", False, True),
        (9.0, True, "wall", True, None),
    ],
)
def test_ratios_are_judged_where_they_prove_something(median, quiet, clock, quick, met) -> None:
    settings = replace(SETTINGS, clock=clock, quick=quick)
    least = TABLE[0].least("concatenated", "fp32")
    assert op_run.judge(ratio(median, quiet), least, settings).met is met


@pytest.mark.parametrize(
    ("case", "share", "bound", "floor", "met"),
    [
        (TABLE[0], 0.61, "compute", 1e-3, True),
        (TABLE[0], 0.59, "compute", 1e-3, False),
        (TABLE[0], 0.59, "memory", 1e-3, None),
        (TABLE[5], 0.69, "memory", 1e-3, False),
        (TABLE[5], 0.71, "memory", 1e-3, True),
        (TABLE[5], 0.10, "memory", 1e-6, None),
        (GRID[0], 0.10, "memory", 1e-3, None),
    ],
)
def test_shares_are_judged_where_one_ceiling_binds(case, share, bound, floor, met) -> None:
    held = Share(1.0, 1.0, floor, share, bound)
    assert attention_run._judge_share(case, "fp32", held, SETTINGS, quiet=True).met is met


def test_rotation_goes_through_sets_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.machine.last_level_cache", lambda: 1 << 20)
    case = GRID[0]
    assert attention_run._set_count(case, 1 << 18, SETTINGS) == 9
    assert attention_run._set_count(case, 1, SETTINGS) == 512
    assert attention_run._set_count(case, 1 << 18, replace(SETTINGS, rotate=False)) == 1
    assert attention_run._set_count(TABLE[0], 1 << 18, SETTINGS) == 1
    seen: list[int] = []
    turn = op_run.in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        turn()
    assert seen == [0, 1, 2, 0, 1]


def test_short_runs_are_repeated_and_counted_a_call() -> None:
    calls: list[int] = []
    samples = measure.interleave({"x": Contestant(lambda: calls.append(1) or time.sleep(1e-3), id, calls=20)}, 2)["x"]
    assert len(calls) == 40
    assert all(1e-3 <= s.wall < 1e-2 for s in samples)
    assert measure.calls_for(lambda: time.sleep(1e-3), 5e-3) in range(1, 6)


def test_ranking_puts_the_quickest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"slow": 2e-2, "middle": 2e-3, "quick": 1e-3}

    def timed(run, calls: int):
        return measure._Time(wall=seconds[run()], cpu=1.0 / seconds[run()], waited=0.0), None

    monkeypatch.setattr(measure, "_timed", timed)
    runs = {name: partial(str, name) for name in seconds}
    assert measure.ranking(runs, "wall", 1e-3) == ["quick", "middle", "slow"]
    near = {name: runs[name] for name in ("middle", "quick")}
    assert measure.ranking(near, "cpu", 1e-3) == ["middle", "quick"]  # those that are near are ranked by the clock


def test_short_samples_share_a_look_at_other_processes() -> None:
    marks = [(0.0, 0.0), (0.3, 0.0), (0.6, 0.3), (0.9, 0.3), (1.2, 0.3), (1.3, 0.44)]
    assert measure._others(marks) == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.2])
    assert measure._others([(0.0, 1.0), (0.1, 1.05)]) == pytest.approx([0.5])


def test_a_sample_that_waited_for_a_core_is_not_quiet() -> None:
    assert Sample(0, 1.0, 1.0, 0.0, measure.WAITED).quiet
    assert not Sample(0, 1.0, 1.0, 0.0, 2 * measure.WAITED).quiet
    assert not Sample(0, 1.0, 1.0, 2 * measure.BUSY).quiet


def test_quick_from_end_to_end(quick: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    names = "^(prefill B8 prompts1 P64 .* D64 causal|train B8|few)"
    status, lines = quick("prefix-attention", "--set", "all", "--cases", names)
    assert status == 0
    assert [line["kind"] for line in lines[:2]] == ["machine", "ceilings"] and lines[-1]["kind"] == "end"
    cases = [line for line in lines if line["kind"] == "case"]
    assert {line["case"].split()[0] for line in cases} == {"prefill", "train", "few"}
    assert {line["dtype"] for line in cases} == {"fp32", "bf16", "fp16"}
    assert any("rotating" in line["buffers"] for line in cases) and any(line["buffers"] == "hot" for line in cases)
    for line in cases:
        overs = [r["over"] for r in line["ratios"]]
        assert overs[:3] == ["concatenated", "explicit", "expanded"] and ("folded" in overs) == line["case"].startswith(
            "few"
        )
        assert all(v["met"] is None for v in line["verdicts"])  # too small to judge
        assert set(line["times"]) == {"ours", *overs} == set(line["errors"])
    shown = capsys.readouterr().out
    assert shown.count("  green: ") == len(cases) and "0 red, 0 targets met, 0 missed" in shown


def test_no_ratio_of_a_red_case(
    quick: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "prefix_attention", lambda q, *args, **settings: q.transpose(1, 2))
    status, lines = quick("prefix-attention", "--cases", "^decode B1 ", "--dtypes", "fp32")
    assert status == 1
    assert [line["kind"] for line in lines] == ["machine", "ceilings", "check", "end"]
    shown = capsys.readouterr()
    assert "CHECK FAILED, no ratios: ours" in shown.err and "1 red" in shown.out and " x  [" not in shown.out


def test_listing_and_no_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["prefix-attention", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert command.main(["prefix-attention", "--cases", "no such case"]) == 1


def test_allocations_and_peaks_are_seen() -> None:
    assert memory.allocated(lambda: torch.zeros(1 << 20).numel()) >= 4 << 20
    assert memory.allocated(lambda: None) == 0
    assert memory.peak_growth(lambda: torch.ones(1 << 24).numel()) >= 60 << 20
    assert memory.peak_growth(lambda: None) < 8 << 20


def test_many_small_calls_do_not_grow(capsys: pytest.CaptureFixture[str]) -> None:
    reading = prefix_attention_memory.growth("reference", 100)
    assert reading.met and "100 calls" in capsys.readouterr().out
    assert not replace(reading, bytes=reading.most + 1).met
