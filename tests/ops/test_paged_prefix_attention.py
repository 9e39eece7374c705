"""paged_prefix_attention against its oracle: ragged rows, shuffled pages, poisoned slots."""

from functools import partial

import pytest
import torch
from op_cases import INF, assert_same, doubled, widest

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan

EXTENTS = [(3, 5), (10, 9), (3, 5), (0, 0), (30, 1)]
RAGGED = ([3, 1, 0, 7, 1], [3, 9, 4, 12, 1])  # queries and own tokens of each row
DECODE = ([1] * 5, [3, 9, 4, 12, 1])


def arguments(shape, *, size=4, heads=(4, 2), dims=(8, 8), dtype=torch.float64, poison=0.0, extents=EXTENTS):
    """A packed batch whose pages lie in any order; every slot no token fills holds `poison`."""
    queries, lens = shape
    (hq, hkv), (d, dv) = heads, dims
    pages = [-(-n // size) for n in lens]
    shuffled = torch.randperm(sum(pages) + 3).tolist()
    table = torch.full((len(lens), max(pages) + 1), -1, dtype=torch.int32)
    caches = [torch.full((sum(pages) + 3, size, hkv, e), poison, dtype=dtype) for e in dims]
    for b, count in enumerate(pages):
        table[b, :count] = torch.tensor([shuffled.pop() for _ in range(count)], dtype=torch.int32)
        for t in range(lens[b]):
            for cache in caches:
                cache[table[b, t // size], t % size] = torch.randn(hkv, cache.shape[3], dtype=dtype)
    q_start = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    start, length = (torch.tensor(v, dtype=torch.int32) for v in zip(*extents, strict=True))
    draw = partial(torch.randn, dtype=dtype)
    return (
        draw(sum(queries), hq, d), *caches, table, q_start, torch.tensor(lens, dtype=torch.int32),
        draw(hkv, 40, d), draw(hkv, 40, dv), start, length,
    )  # fmt: skip


def check(impl, args, plan=None, **more):
    exact = {name: x.double() if torch.is_tensor(x) else x for name, x in more.items()}
    want = reference.paged_prefix_attention(*doubled(args), return_lse=True, **exact)
    got = ops.paged_prefix_attention(*args, return_lse=True, plan=plan, impl=impl, **more)
    names, tolerance = ("out", "lse"), 1e-11 if args[0].dtype == torch.float64 else 1e-5
    assert_same(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), tolerance)
    assert_same({"out": ops.paged_prefix_attention(*args, impl=impl, **more)}, {"out": want[0]}, tolerance)


@pytest.mark.parametrize("dims", [(8, 8), (8, 5)])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("shape", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_equals_the_oracle(impl, shape, size, dims):
    args = arguments(shape, size=size, dims=dims, dtype=widest(impl))
    for more in (
        {},
        {"window": 5},
        {"softcap": 2.0, "scale": 0.4},
        {"sinks": torch.randn(4, 2, dtype=widest(impl))[:, 0]},
    ):
        check(impl, args, **more)
        check(impl, args, plan=BatchPlan.build(*zip(*EXTENTS, strict=True)), **more)


@pytest.mark.parametrize("shape", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_unused_slots_may_hold_anything(impl, shape):
    check(impl, arguments(shape, poison=float("nan"), dtype=widest(impl)))
    check(impl, arguments(shape, poison=INF, dtype=torch.float32))


def test_the_reference_is_attention_over_the_rows_tokens():
    args = arguments(RAGGED)
    out = reference.paged_prefix_attention(*args)
    q, k_cache, v_cache, table, _, _, prefix_k, prefix_v, _, _ = args
    tokens = [(int(table[1, t // 4]), t % 4) for t in range(9)]  # row 1: one query, nine own tokens, prefix 10..18
    k = torch.cat([prefix_k[:, 10:19], torch.stack([k_cache[at] for at in tokens], 1)], 1)
    v = torch.cat([prefix_v[:, 10:19], torch.stack([v_cache[at] for at in tokens], 1)], 1)
    weights = (q[3].view(2, 2, 8) @ k.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(out[3], (weights @ v).view(4, 8), rtol=0, atol=1e-12)


def test_opcheck_and_compile():
    args = arguments(RAGGED, dtype=torch.float32)
    for need_lse in (True, False):
        torch.library.opcheck(
            torch.ops.fastprompt.paged_prefix_attention.default,
            (*args, None, 0.3, None, None, None, None, need_lse, "reference"),
        )
    torch.compiler.reset()
    compiled = torch.compile(ops.paged_prefix_attention, fullgraph=True, backend="aot_eager")
    assert_same({"out": compiled(*args)}, {"out": ops.paged_prefix_attention(*args)}, 1e-6)


def test_gradients_are_refused():
    args = arguments(DECODE)
    with pytest.raises(ArgumentError, match="no gradients"):
        ops.paged_prefix_attention(args[0].requires_grad_(), *args[1:])
    with torch.no_grad():
        assert ops.paged_prefix_attention(*args).isfinite().all()


def test_bad_arguments_are_named(impl):
    args = arguments(RAGGED, dtype=widest(impl))
    for place, name, bad in [
        (0, "q", args[0][0]),
        (1, "k_cache", args[1][..., :3]),
        (2, "v_cache", args[2][:2]),
        (3, "block_table", args[3].float()),
        (3, "block_table", args[3] + 100),
        (4, "q_start", args[4][:3]),
        (4, "q_start", args[4] + 1),
        (5, "kv_len", args[5] - 1),
        (5, "kv_len", args[5] + 90),
        (6, "prefix_k", args[6][:1]),
    ]:
        with pytest.raises(ArgumentError, match=name):
            ops.paged_prefix_attention(*args[:place], bad, *args[place + 1 :], impl=impl)
