"""BatchPlan: rows sorted by prompt."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprompt import native
from fastprompt.errors import ArgumentError
from fastprompt.plan import SHARERS, BatchPlan, unpack


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


def test_rows_of_one_query_share_the_reading_of_a_long_prompt():
    starts, lens = [0, 500, 0, 0, 500, 0, 0, 9], [400, 90, 400, 400, 90, 400, 400, 0]
    queries = [1, 1, 1, 7, 1, 1, 1, 1]
    few = BatchPlan.build(starts, lens, queries=queries)
    assert few.sharing is None and few.tiles is None  # 4 rows save 3 readings of 400 tokens less their costs
    large = [n * 9 for n in lens]
    plan = BatchPlan.build(starts, large, queries=torch.tensor(queries))
    assert plan.sharing.shape == (8 + 2 * SHARERS,) and plan.sharing.dtype == torch.int32
    assert plan.sharing[:8].tolist() == [0, -1, 0, -1, -1, 0, 0, -1]  # row 3 has more queries, prompt 500 too few rows
    assert plan.tiles.tolist() == [[0, 2, 5, 6, *[-1] * 12], [-1] * SHARERS]
    assert BatchPlan.build(starts, large).sharing is None


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)), max_size=120),
    unit=st.sampled_from([50, 300, 5000]),
)
def test_tiles_hold_the_rows_of_one_prompt(rows, unit):
    starts, lens, queries = ([row[i] for row in rows] for i in range(3))
    lens = [n * unit for n in lens]
    plan = BatchPlan.build(starts, lens, queries=queries, capacity_rows=len(rows) + 3)
    assert plan.tiles.shape == ((len(rows) + 3) // 4, SHARERS)
    seen = []
    for i, tile in enumerate(plan.tiles.tolist()):
        members = [row for row in tile if row >= 0]
        assert tile == members + [-1] * (SHARERS - len(members)) and members == sorted(members)
        assert not members or len(members) >= 4
        assert len({(starts[row], lens[row]) for row in members}) <= 1
        assert all(queries[row] == 1 and lens[row] > 64 and plan.sharing[row] == i for row in members)
        seen += members
    assert len(set(seen)) == len(seen) and int((plan.sharing[: len(rows) + 3] >= 0).sum()) == len(seen)


def test_a_plan_takes_over_another_in_place():
    shapes = {"capacity_rows": 20, "queries": [1] * 20}
    shared, lonely = (BatchPlan.build([n * i for i in range(20)], [900] * 20, **shapes) for n in (0, 1))
    assert (shared.tiles >= 0).any() and (lonely.sharing == -1).all()
    plan = BatchPlan.build([], [], capacity_rows=20, queries=[])
    places = [x.data_ptr() for x in (plan.packed, plan.sharing)]
    for other in (shared, lonely, shared):
        assert plan.copy_(other) is plan
        assert torch.equal(plan.packed, other.packed) and torch.equal(plan.sharing, other.sharing)
    assert (plan.copy_(BatchPlan.build([1], [2], capacity_rows=20)).sharing == -1).all()
    assert places == [x.data_ptr() for x in (plan.packed, plan.sharing)]
    with pytest.raises(ArgumentError, match="room for 20 rows, the other for 1"):
        plan.copy_(BatchPlan.build([1], [2]))
    with pytest.raises(ArgumentError, match="no room for sharing"):
        BatchPlan.build([1], [2], capacity_rows=20).copy_(shared)


def outcome(*args, **more):
    """What is in the plan, or the error's text."""
    try:
        plan = BatchPlan.build(*args, **more)
    except ArgumentError as error:
        return str(error)
    return plan.packed.tolist(), plan.sharing if plan.sharing is None else plan.sharing.tolist()


numbers = st.integers(0, 3) | st.integers(-2, 2**31) | st.integers(2**31 - 2, 2**40)


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
@given(rows=st.lists(st.tuples(numbers, numbers), max_size=12), capacity=st.none() | st.integers(0, 14), data=st.data())
def test_python_and_the_extension_agree(rows, capacity, data):
    starts, lens = [s for s, _ in rows], [n for _, n in rows]
    kind = data.draw(st.sampled_from([list, tuple, torch.tensor, lambda x: torch.tensor(x).repeat_interleave(2)[::2]]))
    queries = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=max(0, len(rows) - 1), max_size=len(rows)))
    starts, lens, queries = (kind(v) if v else v for v in (starts, lens, queries))
    assert_builders_agree(starts, lens, capacity_rows=capacity, queries=queries)


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 70, 900]), st.integers(0, 2)), max_size=90),
    spare=st.integers(0, 9),
)
def test_python_and_the_extension_agree_on_sharing(rows, spare):
    starts, lens, queries = ([row[i] for row in rows] for i in range(3))
    assert_builders_agree(starts, lens, queries=queries, capacity_rows=len(rows) + spare)
    assert_builders_agree(starts, lens, queries=queries)


def assert_builders_agree(*args, **more):
    got = []
    for impl in ("reference", ""):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTPROMPT_IMPL", impl)
            got.append(outcome(*args, **more))
    assert got[0] == got[1]


def test_bad_arguments_are_named():
    with pytest.raises(ArgumentError, match="prefix_start has 2 rows and prefix_len has 1"):
        BatchPlan.build([1, 2], [3])
    with pytest.raises(ArgumentError, match=r"prefix_len\[1\] is -3"):
        BatchPlan.build([1, 2], [3, -3])
    with pytest.raises(ArgumentError, match="queries has 1 rows, prefix_start has 2"):
        BatchPlan.build([1, 2], [3, 3], queries=[1])
    with pytest.raises(ArgumentError, match="capacity_rows is 1"):
        BatchPlan.build([1, 2], [3, 3], capacity_rows=1)
    with pytest.raises(ArgumentError, match=r"prefix_start\[1\] is 2147483648, expected a number that fits int32"):
        BatchPlan.build([1, 2**31], [3, 3])
    with pytest.raises(TypeError):
        BatchPlan.build([1.5], [3])
