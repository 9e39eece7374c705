"""paged_prefix_attention in Triton: the tests of the op itself, rows cut into parts, prefixes read together."""

from dataclasses import replace

import pytest
import torch
from cpu_cases import assert_within, bounds, plain
from op_cases import assert_same, doubled
from ops import test_paged_prefix_attention as whole
from ops.test_paged_prefix_attention import (
    DECODE,
    RAGGED,
    arguments,
    check,
    test_unused_slots_may_hold_anything,  # noqa: F401
)

from fastprompt import costs, ops, plan, reference
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan


@pytest.mark.parametrize("shape", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_equals_the_oracle(impl, shape):
    whole.test_equals_the_oracle(impl, shape, 4, (8, 5))


@pytest.mark.long
@pytest.mark.parametrize("dims", [(8, 8), (8, 5)])
@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("shape", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_equals_the_oracle_whatever_the_pages(impl, shape, size, dims):
    whole.test_equals_the_oracle(impl, shape, size, dims)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("shape", [RAGGED, DECODE, ([1, 40, 3, 0, 1], [70, 41, 3, 5, 1])])
def test_rows_cut_into_parts(monkeypatch, shape, parts):
    monkeypatch.setattr(costs, "parts", lambda *args: parts)
    args = arguments(shape, dtype=torch.float32, poison=float("nan"), heads=(6, 2), dims=(8, 5))
    for more in ({}, {"window": 7, "sinks": torch.randn(6)}):
        check("triton", args, **more)


MANY = [(3, 19)] * 9 + [(30, 4), (0, 0), (3, 19)]  # rows of one prompt, alone, without any
ROWS = len(MANY)


def shared_call(queries, *, heads=(4, 2), dims=(8, 8), dtype=torch.float32):
    """A batch of MANY with these queries, whose own tokens differ, and its plan's lists of queries."""
    lens = [n + i % 5 for i, n in enumerate(queries)]
    args = arguments((queries, lens), heads=heads, dims=dims, dtype=dtype, poison=float("nan"), extents=MANY)
    return args, {"queries": queries, "device": args[0].device}


@pytest.fixture
def eager_sharing(monkeypatch):
    """Rows share whenever there are enough, and prefixes are cut into several parts."""
    from fastprompt._triton import paged_prefix_attention

    free = replace(costs.table("cpu"), state_tokens=0, least_saving=1)
    monkeypatch.setattr(costs, "table", lambda device: free)
    for module in (plan, paged_prefix_attention):
        monkeypatch.setattr(module, "SHARERS", 8)
    monkeypatch.setattr(paged_prefix_attention, "_PREFIX_PART", 16)


@pytest.mark.usefixtures("small_tiles", "eager_sharing")
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), pytest.param((5, 5), marks=pytest.mark.long)])
@pytest.mark.parametrize("queries", [[1] * ROWS, [1, 3, 1, 1] * 3, [1] * 8 + [0, 0, 20, 1]])
def test_prefixes_read_together(queries, heads):
    args, more = shared_call(queries, heads=heads)
    built = BatchPlan.build(*args[-2:], **more)
    assert built.sharing is not None
    sinks = torch.randn(heads[0])
    for settings in ({}, {"sinks": sinks, "softcap": 2.0}, {"window": 6}):
        check("triton", args, plan=built, **settings)


@pytest.mark.usefixtures("small_tiles", "eager_sharing")
@pytest.mark.parametrize("parts", [1, 3])
def test_own_keys_and_prefixes_both_in_parts(monkeypatch, parts):
    monkeypatch.setattr(costs, "parts", lambda *args: parts)
    args, more = shared_call([1] * ROWS, dims=(33, 17))
    check("triton", args, plan=BatchPlan.build(*args[-2:], **more), softcap=3.0)


@pytest.mark.usefixtures("eager_sharing")
def test_one_launch_serves_any_plan_of_its_capacity(monkeypatch):
    """As in a captured graph: the same launches, with other rows in the same buffers."""
    from fastprompt._triton import paged_prefix_attention as op

    grids = []
    launch = op.launch
    monkeypatch.setattr(
        op, "launch", lambda kernel, programs, *a, **m: (grids.append(programs), launch(kernel, programs, *a, **m))
    )
    args, more = shared_call([1] * ROWS)
    held = BatchPlan.build([], [], capacity_rows=ROWS + 3, queries=[])
    outs = []
    for extents in (MANY, MANY[::-1], [(i, 4) for i in range(ROWS)]):
        args = list(args)
        args[-2:] = (torch.tensor(v, dtype=torch.int32) for v in zip(*extents, strict=True))
        held.copy_(BatchPlan.build(*args[-2:], **more, capacity_rows=ROWS + 3))
        out = ops.paged_prefix_attention(*args, plan=held, impl="triton")
        outs.append((out, reference.paged_prefix_attention(*doubled(args))))
        again = ops.paged_prefix_attention(*args, plan=held, impl="triton")
        assert torch.equal(out, again)
    for out, want in outs:
        assert_same({"out": out}, {"out": want}, 1e-5)
    assert len(set(zip(grids[::2], grids[1::2], strict=True))) == 1


@pytest.mark.usefixtures("eager_sharing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_of_shared_readings_are_bounded_by_those_of_plain_pytorch(dtype):
    args, more = shared_call([1] * ROWS, dims=(64, 64), dtype=dtype)
    built = BatchPlan.build(*args[-2:], **more)
    names = ("out", "lse")
    exact = dict(zip(names, reference.paged_prefix_attention(*doubled(args), return_lse=True), strict=True))
    usual = None
    if dtype != torch.float32:
        usual = dict(zip(names, plain(reference.paged_prefix_attention, *args, return_lse=True), strict=True))
    got = ops.paged_prefix_attention(*args, plan=built, impl="triton", return_lse=True)
    assert got[0].dtype == dtype
    allowed = bounds(exact, usual, dtype, 64 + 64 + 50)
    assert_within(dict(zip(names, got, strict=True)), exact, allowed, dtype)


def test_lists_must_be_where_the_tensors_are():
    args, more = shared_call([1] * ROWS)
    built = BatchPlan.build(*args[-2:], queries=more["queries"], capacity_rows=ROWS, device="meta")
    with pytest.raises(ArgumentError, match=r"plan.sharing is on meta.*build the plan with"):
        ops.paged_prefix_attention(*args, plan=built, impl="triton")
