"""What the native attention kernels refuse, in the words of the reference: they never read where nothing is."""

from functools import partial

import pytest
import torch
from cpu_cases import NATIVE
from op_cases import attention

from fastprompt import native, ops
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan

pytestmark = pytest.mark.skipif(not NATIVE, reason=str(native.obstacle()))
run, run_paged = partial(ops.prefix_attention, impl="cpu"), partial(ops.paged_prefix_attention, impl="cpu")

BAD_EXTENTS = {
    "prefix_start": [-1, 38, 2**31, 2**40, 2**62, -(2**63)],
    "prefix_len": [-1, 38, 41, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_EXTENTS.items() for v in values])
def test_extents_outside_the_arena_are_refused(name, value):
    call = attention([(3, 5), (10, 9)], queries=3, keys=4, dtype=torch.float32)
    bad = call.tensors[name].long()
    bad[1] = value
    wrong = call.with_tensors(**{name: bad})
    for given_call in (wrong, wrong.leaves()[0]):  # without gradients, and with
        for plan in (None, BatchPlan.build([3, 10], [5, 9])):
            with pytest.raises(ArgumentError, match=r"row 1 .* prefix_start and prefix_len"):
                given_call(run, plan=plan)
    t = wrong.tensors
    cache, place = torch.randn(3, 4, 2, 8), torch.tensor([[0], [1]])
    paged = [torch.randn(2, 4, 8), cache, cache, place, torch.tensor([0, 1, 2]), torch.tensor([1, 2])]
    with pytest.raises(ArgumentError, match=r"row 1 .* prefix_start and prefix_len"):
        run_paged(*paged, t["prefix_k"], t["prefix_v"], t["prefix_start"], t["prefix_len"])


def test_a_prefix_bias_that_is_too_narrow_is_refused():
    call = attention([(3, 5), (10, 9)], queries=3, keys=4, dtype=torch.float32)
    narrow = call.with_tensors(prefix_bias=torch.zeros(1, 1, 1, 8))
    for impl in ("cpu", "reference"):
        with pytest.raises(ArgumentError, match="prefix_bias has 8 columns, the longest prefix has 9 tokens"):
            narrow(ops.prefix_attention, impl=impl)


BAD_PAGES = {
    "falls": ("q_start", [0, 3, 2, 4]),
    "begins late": ("q_start", [1, 2, 3, 4]),
    "ends early": ("q_start", [0, 1, 2, 3]),
    "ends late": ("q_start", [0, 1, 2, 5]),
    "fewer tokens than queries": ("kv_len", [3, 0, 9]),
    "more tokens than pages": ("kv_len", [3, 4, 13]),
    "negative length": ("kv_len", [3, 4, -(2**40)]),
    "huge length": ("kv_len", [3, 4, 2**62]),
    "no such block": ("block_table", [[0, 1, 2], [3, 4, 5], [6, 8, 7]]),
    "negative block": ("block_table", [[0, 1, 2], [3, 4, 5], [6, -1, 7]]),
    "huge block": ("block_table", [[0, 1, 2], [3, 4, 5], [6, 2**40, 7]]),
}


@pytest.mark.parametrize("bad", BAD_PAGES)
def test_bad_pages_are_refused(bad):
    cache, prefix = torch.randn(8, 4, 2, 8), torch.randn(2, 40, 8)
    numbers = {
        "block_table": [[0, 1, 2], [3, 4, 5], [6, 7, -9]], "q_start": [0, 1, 2, 4], "kv_len": [3, 12, 7],
        "prefix_start": [3, 10, 0], "prefix_len": [5, 9, 0],
    }  # fmt: skip
    tensors = {"q": torch.randn(4, 4, 8), "k_cache": cache, "v_cache": cache, "prefix_k": prefix, "prefix_v": prefix}
    tensors |= {name: torch.tensor(x) for name, x in numbers.items()}
    assert run_paged(**tensors).isfinite().all()
    name, wrong = BAD_PAGES[bad]
    for impl in ("cpu", "reference"):
        with pytest.raises(ArgumentError, match=name):
            ops.paged_prefix_attention(**tensors | {name: torch.tensor(wrong)}, impl=impl)


@pytest.mark.parametrize("rows", [[(3, 5), (3, 5), (10, 9)], [(3, 5), (10, 9)], [(3, 5), (10, 9), (3, 5), (0, 0)]])
def test_a_plan_of_another_batch_is_refused_as_by_the_reference(rows):
    plan = BatchPlan.build([3, 10, 3], [5, 9, 5], capacity_rows=6)
    call, said = attention(rows, queries=2, keys=4, dtype=torch.float32), []
    for impl in ("cpu", "reference"):
        with pytest.raises(ArgumentError, match="plan") as error:
            call(ops.prefix_attention, impl=impl, plan=plan)
        said.append(str(error.value))
    assert said[0] == said[1]


BAD_PLANS = {
    "a row beyond the batch": (0, [10**6, 0, 1, 2]),
    "a row twice": (0, [0, 0, 1, 2]),
    "a group that ends where it begins": (4, [0, 0, 4]),
    "a group beyond the batch": (4, [0, 5, 4]),
    "no end": (4, [0, -1, -1]),
}


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_a_plan_that_was_written_to_is_refused(bad):
    call = attention([(0, 5)] * 4, queries=1, keys=3, dtype=torch.float32)
    plan = BatchPlan.build([0] * 4, [5] * 4)
    place, numbers = BAD_PLANS[bad]
    plan.packed[place : place + len(numbers)] = torch.tensor(numbers)
    with pytest.raises(ArgumentError, match="plan is not one that"):
        call(run, plan=plan)
