"""The ops that are not attention to own keys in one piece: their contestants, and `micro` from end to end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import attention_baselines as baselines
from bench import embed_prompts, grouped_linear, merge_states, micro, op_cases, paged_prefix_attention
from bench.attention_cases import Case
from bench.attention_check import truth
from bench.attention_inputs import build
from bench.ceilings import Work
from bench.measure import CheckFailed
from bench.op_cases import OpCase

OTHERS = [*embed_prompts.CASES, *merge_states.CASES, *grouped_linear.CASES]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_every_op_of_the_library_is_measured() -> None:
    from fastprompt import dispatch

    assert set(micro.OPS) == set(dispatch.OPS)
    for name, op in micro.OPS.items():
        assert {case.op for case in op.sets["table"]} == {name}
        assert len({case.name for case in op.sets["table"]}) == len(op.sets["table"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.name)
def test_all_contestants_compute_the_same(case: OpCase, dtype: torch.dtype) -> None:
    small = case.shrunk()
    x = small.inputs(dtype)
    right = op_cases._truth(small, x)
    for name, entry in {"ours": small.ours("reference"), **small.baselines()}.items():
        right.errors(name, entry.named(entry.build(x)()), slack=4.0)


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.name)
def test_a_wrong_result_is_caught(case: OpCase) -> None:
    small = case.shrunk()
    x = small.inputs(torch.float32)
    right = op_cases._truth(small, x)
    good = small.ours("reference")
    late = {name: value.clone() for name, value in good.named(good.build(x)()).items()}
    for value in late.values():
        value.view(-1)[-1] += 1e-3
        with pytest.raises(CheckFailed, match="late: "):
            right.errors("late", late)
        value.view(-1)[-1] -= 1e-3


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.name)
def test_copies_hold_the_same_numbers(case: OpCase) -> None:
    x = case.shrunk().inputs(torch.bfloat16)
    other = case.shrunk().copy(x)
    assert x.keys() == other.keys()
    for name, value in x.items():
        assert torch.equal(value, other[name])
    assert any(x[name].data_ptr() != other[name].data_ptr() for name in x)


def test_work_counts_what_a_call_must_do() -> None:
    merge = merge_states.MergeCase(2, 3, 5, 7)
    assert merge.work(merge.inputs(torch.float32)) == Work(3.0 * 210, 3 * (210 * 4 + 30 * 4))
    linear = grouped_linear.LinearCase(4, 3, 2, 5, 6)
    read = 4 * 2 * 5 + 3 * 6 * 5 + 3 * 6
    assert linear.work(linear.inputs(torch.bfloat16)) == Work(2.0 * 4 * 2 * 6 * 5, (read + 4 * 2 * 6) * 2)
    embed = embed_prompts.EmbedCase(2, 2, 3, 4, hidden=8, vocabulary=1)  # one id, so that it is read once
    assert embed.work(embed.inputs(torch.float32)) == Work(0.0, (1 + 2 * 3 + 2 * 7) * 8 * 4 + 2 * 4 * 8)


@pytest.mark.parametrize("case", paged_prefix_attention.CASES, ids=lambda c: c.name)
def test_paged_contestants_compute_the_same(case: Case) -> None:
    small = case.shrunk()
    inputs = build(small, "fp32")
    right = truth(small, inputs)
    entries = [paged_prefix_attention.ours(small, "reference")]
    entries += [
        paged_prefix_attention.expanded(small, form)
        for form in baselines.forms(small, inputs.mask, torch.float32)
        if form.repeats == 1
    ]
    for entry in entries:
        right.errors(entry.about, entry.named(entry.build(inputs)()), slack=8.0)


@pytest.mark.parametrize(("rows", "prompts"), [(32, 4), (7, 3), (6, 1), (5, 5)])
def test_in_a_single_pass_no_neighbours_share(rows: int, prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows, prompts, 16, 1, 8, (16, 4))
    inputs = build(case, "fp32")
    seen: list[torch.Tensor] = []
    called = baselines.prefix_attention

    def spy(*args, plan, **settings):
        seen.append(args[5][plan.order.long()])
        assert torch.equal(plan.order, inputs.plan.order) and plan.num_groups == rows
        return called(*args, plan=plan, **settings)

    monkeypatch.setattr(baselines, "prefix_attention", spy)
    entry = baselines.single_pass(case, "reference")
    truth(case, inputs).errors("single pass", entry.named(entry.build(inputs)()), slack=4.0)
    (start,) = seen
    assert not (start[1:] == start[:-1]).any()


def test_quick_from_end_to_end(quick: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    others = ["embed_prompts", "merge_states", "grouped_linear", "paged_prefix_attention"]
    status, lines = quick("micro", "--op", *others)
    assert status == 0
    cases = [line for line in lines if line["kind"] == "case"]
    assert {line["op"] for line in cases} == set(others)
    for line in cases:
        assert set(line["times"]) == {"ours", *(r["over"] for r in line["ratios"])} == set(line["errors"])
        assert all(v["met"] is None for v in line["verdicts"])  # too small to judge
    shown = capsys.readouterr().out
    assert all(f"{op}, impl" in shown for op in others) and "0 red, 0 targets met" in shown
