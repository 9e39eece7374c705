"""The native attention kernels with every instruction set: any call, equal bits on every run, threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
import torch
from cpu_cases import (
    NAN,
    NATIVE,
    TENSORS,
    Paged,
    any_call,
    any_paged,
    assert_within,
    bounds,
    described,
    exact_and_bounds,
    largest,
    plain,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import INF, attention, results, rounding, running

from fastprompt import native, ops, reference
from fastprompt.plan import BatchPlan

pytestmark = pytest.mark.skipif(not NATIVE, reason=str(native.obstacle()))
run, run_paged = partial(ops.prefix_attention, impl="cpu"), partial(ops.paged_prefix_attention, impl="cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _new_memory_holds_nan():
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


def randomly(examples):
    """Runs a test on so many generators. Details come from these: hypothesis would repeat parts of calls it had.

    A profile that has less than hypothesis' usual 100 examples gets that share of them.
    """
    share = settings.default.max_examples / 100
    repeat = settings(max_examples=round(share * examples), derandomize=True, database=None)
    return lambda test: repeat(given(random=st.randoms(use_true_random=True))(test))


def nan(x):
    return torch.full_like(x, NAN) if x.is_floating_point() else x


def check(call, lse=True, count=1, **more):
    """With every instruction set, on so many threads, over memory in which an earlier call left NaN."""
    exact, allowed = exact_and_bounds(call, lse=lse)
    for variant in NATIVE:
        with running(variant), threads(count):
            results(call.map(nan), run, lse=lse)
            got = results(call, run, lse=lse, **more)
            with torch.no_grad():  # calls without gradients take another way to the kernel
                assert torch.equal(call(run, **more), got["out"])
        assert_within(got, exact, allowed, described(variant, call.tensors, call.settings))


def check_paged(call, count=1, **more):
    exact, dtype = call.doubled()(reference.paged_prefix_attention), call.args[0].dtype
    usual = None if dtype == torch.float32 else plain(call, reference.paged_prefix_attention)
    keys = int(call.args[5].max()) + int(call.args[9].max())
    allowed = bounds(exact, usual, dtype, call.args[0].shape[2] + call.args[2].shape[3] + keys)
    for variant in NATIVE:
        with running(variant), threads(count):
            Paged([nan(x) for x in call.args], call.settings)(run_paged)
            got = call(run_paged, **more)
        assert_within(got, exact, allowed, described(variant, call.args, call.settings))


def plan_of(random, start, length):
    room = random.choice([None, 0, 3])
    return None if room is None else BatchPlan.build(start, length, capacity_rows=len(start) + room)


@randomly(250)
def test_any_call(random):
    call = any_call(random)
    t = call.tensors
    check(call, random.random() < 0.5, plan=plan_of(random, t["prefix_start"], t["prefix_len"]))


@randomly(150)
def test_any_paged_call(random):
    call = any_paged(random)
    check_paged(call, plan=plan_of(random, *call.args[8:10]))


@pytest.mark.parametrize("keys", [255, 256, 257, 511, 513, 1500])
@pytest.mark.parametrize("queries", [1, 9, 48, 49, 65])
def test_blocks_of_keys_and_tiles_of_queries(queries, keys):
    for dtype, more in ((torch.float32, {"window": 300}), (torch.bfloat16, {}), (torch.float16, {"causal": False})):
        check(
            attention(
                [(0, 259)], queries=queries, keys=keys, dims=(32, 32), heads=(2, 1), tokens=260, dtype=dtype, **more
            )
        )


@pytest.mark.parametrize(
    "each", [(1, (1, 1)), (1, (3, 1)), (5, (1, 1)), (7, (2, 1)), (11, (2, 2)), (1, (24, 8)), (8, (4, 2))]
)
def test_shared_prompts_fill_tiles_of_any_number_of_rows(each):
    queries, heads = each
    for rows, keys in ((3, 2), (9, 0), (25, 1), (43, 0), (64, 2), (65, 0)):
        extents = [(0, 40)] * rows + [(3, 33)] * 2
        check(attention(extents, queries=queries, keys=keys, heads=heads, dims=(8, 40), tokens=45, dtype=torch.float16))


def test_many_rows_that_end_in_one_tile():
    check(
        attention(
            [(0, 40)] * 64, queries=1, keys=0, heads=(1, 1), dims=(8, 256), tokens=45, softcap=2.0, dtype=torch.float16
        )
    )


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("extents", [[(0, 0)], [(5, 900)] * 3, [(5, 1100), (0, 2), (5, 1100), (0, 0)]])
def test_few_rows_split_their_keys_among_threads(extents, count):
    for queries, keys, dims in ((1, 1500, (64, 64)), (3, 5000, (16, 8)), (1, 0, (8, 8)), (9, 1300, (33, 17))):
        call = attention(extents, queries=queries, keys=keys, dims=dims, tokens=1200, dtype=torch.float32)
        check(call, count=count)


@randomly(50)
def test_any_call_on_several_threads(random):
    check(any_call(random), count=random.choice([3, 5, 8]))
    check_paged(any_paged(random), count=random.choice([3, 5, 8]))


def gradients(call, out, lse, dout, dlse, wanted):
    t, s = call.tensors, call.settings
    scale = t["q"].shape[3] ** -0.5 if s.get("scale") is None else s["scale"]
    return torch.ops.fastprompt.prefix_attention_backward.default(
        dout, dlse, out, lse, *(t.get(name) for name in TENSORS),
        s.get("causal", True), scale, s.get("window"), s.get("softcap"), None, wanted, "cpu",
    )  # fmt: skip


@randomly(40)
def test_gradients_are_equal_to_the_last_bit(random):
    """On every run, for any number of threads, and whatever else is wanted."""
    call = any_call(random)
    has = [name in call.tensors for name in (*TENSORS[:5], *TENSORS[7:10])]
    for variant in NATIVE:
        with running(variant), torch.no_grad():
            out, lse = call(run, return_lse=True)
            dout, dlse = torch.randn_like(out), random.choice([None, torch.randn_like(lse)])
            first = gradients(call, out, lse, dout, dlse, has)
            for count in (1, 1, 2, 3):
                some = [w and (count == 1 or random.random() < 0.5) for w in has]
                with threads(count):
                    again = gradients(call, out, lse, dout, dlse, some)
                for a, b, want in zip(first, again, some, strict=True):
                    assert torch.equal(a, b) if want else b.numel() == 0


@randomly(40)
def test_a_row_alone_is_the_row_in_its_batch(random):
    call = any_call(random)
    for variant in NATIVE:
        with running(variant), torch.no_grad():
            together = call(run)
            rows = range(len(together))
            alone = torch.cat([call.row(b)(run) for b in rows])
        terms = call.tensors["k"].shape[2] + int(call.tensors["prefix_len"].max())
        step = rounding(torch.float32, terms) if alone.dtype == torch.float32 else 2 * torch.finfo(alone.dtype).eps
        assert largest(together.double() - alone.double()) <= step * max(1.0, largest(alone)), variant


@pytest.mark.parametrize("count", [1, 2])
def test_eight_python_threads_at_once(count):
    calls = [any_call(Random(seed)) for seed in range(8)]

    def work(i):
        return results(calls[i], run)

    with threads(count), ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(count,)) as pool:
        want = [work(i) for i in range(8)]
        order = [*range(8)] * 6
        for i, got in zip(order, pool.map(work, order), strict=True):
            assert all(torch.equal(got[name], x) for name, x in want[i].items())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dims", [(64, 64), (80, 40)])
@pytest.mark.parametrize("queries", [1, 8, 9, 70])
def test_errors_are_at_most_twice_those_of_plain_pytorch(queries, dims, dtype):
    call = attention([(3, 40), (50, 64), (3, 40), (0, 0)], queries=queries, keys=70, dims=dims, tokens=120, dtype=dtype)
    exact = results(call.map(torch.Tensor.double), reference.prefix_attention, lse=False)
    usual = plain(results, call, reference.prefix_attention, lse=False)
    for variant in NATIVE:
        with running(variant):
            got = results(call, run, lse=False)
        for name, want in exact.items():
            allowed = 2 * largest(usual[name].double() - want) + torch.finfo(dtype).eps * largest(want)
            assert largest(got[name].double() - want) <= allowed, (variant, name)


LOSSES = [
    lambda out: out.sum(),
    lambda out: out[..., ::2].square().sum(),
    lambda out: (out.transpose(1, 2).flatten() * torch.linspace(-1, 1, out.numel())).sum(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=["expanded", "gaps", "transposed"])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (1, 1)])
@pytest.mark.parametrize("queries", [1, 20])
def test_gradients_of_any_strides(queries, dims, loss):
    call = attention([(3, 9), (0, 0)], queries=queries, keys=21, dims=dims, dtype=torch.float32)

    def found(call, op):
        leaves, names = call.leaves()
        return dict(zip(names, torch.autograd.grad(loss(leaves(op)), [leaves.tensors[n] for n in names]), strict=True))

    exact = found(call.map(torch.Tensor.double), reference.prefix_attention)
    allowed = bounds(exact, None, torch.float32, 30 + sum(dims))
    for variant in NATIVE:
        with running(variant):
            assert_within(found(call, run), exact, allowed, variant)


@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("hidden", [-INF, torch.finfo(torch.float32).min])
def test_a_bias_may_hide_keys(hidden, queries):
    call = attention([(3, 9), (5, 4)], queries=queries, keys=20, bias=(2, 1, queries), dtype=torch.float32)
    for name in ("bias", "prefix_bias"):
        mask = torch.rand(call.tensors[name].shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., 0] = False
        call = call.with_tensors(**{name: call.tensors[name].masked_fill(mask, hidden)})
    check(call)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("value", [2**40, -(2**40)])
@pytest.mark.parametrize("name", ["kv_start", "kv_len", "q_start"])
def test_bounds_and_positions_may_be_anything(name, value, queries):
    for causal, window in ((True, None), (False, 4)):
        settings = {"causal": causal, "window": window, "dtype": torch.float32}
        call = attention([(3, 9), (0, 0)], queries=queries, keys=12, **settings)
        check(call.with_tensors(**{name: torch.tensor([value, 1])}))


def test_opcheck():
    call = attention(
        [(3, 3), (4, 3), (0, 0)], queries=3, keys=5, strided=True, sinks=True, bias=(1, 4, 1), dtype=torch.float32
    )
    leaves, _ = call.leaves()
    args = (*(leaves.tensors.get(name) for name in TENSORS), True, 0.3, None, None, None, True, "cpu")
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, args)
    paged = any_paged(Random(5))
    args = (*paged.args, None, 0.3, None, None, None, None, True, "cpu")
    torch.library.opcheck(torch.ops.fastprompt.paged_prefix_attention.default, args)
