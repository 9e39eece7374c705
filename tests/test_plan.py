"""BatchPlan: rows sorted by prompt."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprompt import native
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan, unpack


@pytest.fixture(params=["python", *([] if native.obstacle() else ["native"])], autouse=True, scope="module")
def builder(request):
    """Plans are built in Python, which is what runs without the extension, and in C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTPROMPT_IMPL", raising=False)
        if request.param == "python":
            patch.setenv("FASTPROMPT_IMPL", "reference")
        yield request.param


def test_groups_rows_by_prompt():
    plan = BatchPlan.build([9, 3, 0, 9, 3, 7], [2, 4, 0, 2, 5, 0])
    assert plan.order.tolist() == [1, 4, 0, 3, 2, 5]  # rows without a prompt last, wherever they start
    assert plan.group_offsets.tolist() == [0, 1, 2, 4, 6, -1, -1]
    assert plan.group_start.tolist() == [3, 3, 9, 0, -1, -1]
    assert plan.group_len.tolist() == [4, 5, 2, 0, -1, -1]
    assert (plan.num_rows, plan.num_groups) == (6, 4)


def test_the_size_depends_on_the_capacity_alone():
    small, large = BatchPlan.build([4], [2], capacity_rows=8), BatchPlan.build([0] * 8, [0] * 8, capacity_rows=8)
    assert small.packed.shape == large.packed.shape and small.packed.dtype == torch.int32
    assert small.order.tolist() == [0, *[-1] * 7] and small.group_offsets.tolist() == [0, 1, *[-1] * 7]
    assert unpack(small.packed) == ([0], [0, 1])


def test_tensors_and_lists_give_the_same_plan():
    starts, lens = [5, 1, 5], [2, 3, 2]
    for dtype in (torch.int32, torch.int64):
        plan = BatchPlan.build(torch.tensor(starts, dtype=dtype), torch.tensor(lens, dtype=dtype))
        assert torch.equal(plan.packed, BatchPlan.build(starts, lens).packed)


@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=30), spare=st.integers(0, 5))
def test_every_row_is_in_the_group_of_its_prompt(rows, spare):
    plan = BatchPlan.build([s for s, _ in rows], [n for _, n in rows], capacity_rows=len(rows) + spare)
    order, offsets = unpack(plan.packed)
    assert sorted(order) == list(range(len(rows))) and len(offsets) == plan.num_groups + 1
    seen = set()
    for g, (a, b) in enumerate(pairwise(offsets)):
        prompt = (int(plan.group_start[g]), int(plan.group_len[g]))
        assert b > a and prompt not in seen and order[a:b] == sorted(order[a:b])
        assert all((rows[r] if rows[r][1] else (0, 0)) == prompt for r in order[a:b])
        seen.add(prompt)


def outcome(*args, **more):
    """The packed plan as a list, or the error's text."""
    try:
        return BatchPlan.build(*args, **more).packed.tolist()
    except ArgumentError as error:
        return str(error)


numbers = st.integers(0, 3) | st.integers(-2, 2**31) | st.integers(2**31 - 2, 2**40)


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
@given(rows=st.lists(st.tuples(numbers, numbers), max_size=12), capacity=st.none() | st.integers(0, 14), data=st.data())
def test_python_and_the_extension_agree(rows, capacity, data):
    starts, lens = [s for s, _ in rows], [n for _, n in rows]
    kind = data.draw(st.sampled_from([list, tuple, torch.tensor, lambda x: torch.tensor(x).repeat_interleave(2)[::2]]))
    starts, lens = (kind(v) if v else v for v in (starts, lens))
    got = []
    for impl in ("reference", ""):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTPROMPT_IMPL", impl)
            got.append(outcome(starts, lens, capacity_rows=capacity))
    assert got[0] == got[1]


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="prefix_start has 2 rows and prefix_len has 1"):
        BatchPlan.build([1, 2], [3])
    with pytest.raises(ArgumentError, match=r"prefix_len\[1\] is -3"):
        BatchPlan.build([1, 2], [3, -3])
    with pytest.raises(ArgumentError, match="capacity_rows is 1"):
        BatchPlan.build([1, 2], [3, 3], capacity_rows=1)
    with pytest.raises(ArgumentError, match=r"prefix_start\[1\] is 2147483648, expected a number that fits int32"):
        BatchPlan.build([1, 2**31], [3, 3])
    with pytest.raises(TypeError):
        BatchPlan.build([1.5], [3])
