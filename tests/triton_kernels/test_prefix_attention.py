"""prefix_attention in Triton against its oracle: the op's own grid, shrunk to what an interpreter bears.

A gradient of four rows of a few queries takes it a second.
"""

import pytest
import torch
from cpu_cases import assert_within, exact_and_bounds
from op_cases import INF, assert_same, attention, results
from ops.test_prefix_attention import PADDING

from fastprompt import ops, reference
from fastprompt.errors import ImplementationError

MIXED = [(3, 5), (10, 9), (3, 5), (0, 0)]  # shared, lonely and absent prompts
OVERLAPPING = [(3, 8), (5, 8), (3, 4), (7, 2)]
LONG = [(3, 5), (8, 27), (0, 0), (8, 27)]  # more keys than a small tile has
PADDED = [pytest.param(p, marks=() if p in ("none", "right", "dropped") else pytest.mark.long) for p in PADDING]


def call(extents, padding="none", times=1, **settings):
    """A call of few heads; `times` stretches what pads its rows."""
    rows = {name: [n * times for n in values[: len(extents)]] for name, values in PADDING[padding].items()}
    return attention(extents, **{"heads": (2, 1), "dtype": torch.float32} | settings | rows)


def triton(*args, **more):
    return ops.prefix_attention(*args, **more, impl="triton")


def check(given, lse=True):
    want = results(given.map(torch.Tensor.double), reference.prefix_attention, lse=lse)
    assert_same(results(given, triton, lse=lse), want, 1e-5)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("queries", "causal"), [(1, True), (7, True), (7, False)])
def test_equals_the_oracle(queries, causal, padding):
    for extents, window, softcap in ((MIXED, None, None), (OVERLAPPING, 3, 3.0)):
        settings = {"causal": causal, "window": window, "softcap": softcap}
        check(call(extents, padding, queries=queries, keys=7, **settings), lse=window is not None)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 21), (False, 6)])
def test_equals_the_oracle_over_many_tiles(causal, window, padding):
    queries = 9 if padding == "static" else 35
    check(call(LONG[:3], padding, 5, queries=queries, keys=35, heads=(1, 1), causal=causal, window=window))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("heads", "dims"), [((6, 2), (8, 3)), ((5, 1), (33, 17)), ((2, 2), (80, 32)), ((1, 1), (32, 96)), ((1, 1), (1, 1))]
)
def test_groups_and_head_sizes_over_many_tiles(heads, dims):
    check(call(LONG[1:3], queries=19, keys=20, heads=heads, dims=dims, strided=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dims", [(128, 128), (160, 256)])
def test_large_heads(dims):
    check(call(MIXED[1:3], queries=3, keys=9, dims=dims))


@pytest.mark.parametrize("padding", PADDING)
def test_sinks_biases_and_value_sizes(padding):
    for extents, bias, window, sinks in ((MIXED, (1, 2, 1), None, True), (OVERLAPPING, (4, 1, 5), 6, False)):
        settings = {"window": window, "sinks": sinks, "bias": bias, "strided": True, "scale": 0.9, "softcap": 2.0}
        check(call(extents, padding, queries=5, keys=7, dims=(8, 3), **settings))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [True, False])
def test_biases_over_many_tiles(causal):
    check(call(LONG, queries=18, keys=20, bias=(4, 2, 18), causal=causal))


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "tokens"), [(0, 2, 3, 9), (2, 0, 3, 9), (2, 2, 0, 9), (2, 2, 3, 0), (2, 1, 0, 0)]
)
def test_empty_sizes(rows, queries, keys, tokens):
    extents = [(2, 3), (0, 0)] if tokens else [(0, 0), (5, 0)]
    check(call(extents[:rows], queries=queries, keys=keys, tokens=tokens))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_summed_in_order(monkeypatch, parts):
    from fastprompt._triton import tiles

    monkeypatch.setattr(tiles, "_FULL", parts * 3)  # an arena of 40 tokens has 3 tiles
    assert tiles.splits(3, 4) == parts
    given = call(OVERLAPPING, queries=5, keys=5, strided=True)
    check(given)
    first, again = (results(given, triton, lse=False) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0}, {"sinks": True, "window": 6}])
def test_padding_and_arena_slack_may_hold_anything(features, queries):
    given = call(
        MIXED, queries=queries, keys=6, kv_start=[0, 2, 1, 3], kv_len=[6, 5, 6, 4], q_start=[6 - queries] * 4,
        **features,
    )  # fmt: skip
    t, j = given.tensors, torch.arange(6)
    padding = ((j < t["kv_start"][:, None]) | (j >= t["kv_len"][:, None]))[:, None, :, None]
    slack = torch.ones(40, dtype=torch.bool)
    for start, length in MIXED:
        slack[start : start + length] = False
    want = results(given.map(torch.Tensor.double), reference.prefix_attention)
    for poison in (float("nan"), INF):
        dirty = given.with_tensors(
            **{n: t[n].masked_fill(padding, poison) for n in ("k", "v")},
            **{n: t[n].masked_fill(slack[None, :, None], poison) for n in ("prefix_k", "prefix_v")},
        )
        assert_same(results(dirty, triton), want, 1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing(sinks):
    given = call([(0, 0), (2, 4)], queries=3, keys=3, kv_start=[3, 3], sinks=sinks)
    check(given)
    found = results(given, triton)
    assert (found["out"][0] == 0).all() and (found["dq"][0] == 0).all() and (found["dk"] == 0).all()
    assert sinks or (found["lse"][0] == -INF).all()


def test_a_query_whose_keys_are_all_biased_away_sees_nothing():
    given = call(MIXED[2:], queries=3, keys=10, bias=(2, 1, 1))
    for name in ("bias", "prefix_bias"):
        given.tensors[name][0] = -INF
    check(given)


def test_only_the_wanted_gradients():
    given = call(MIXED, queries=5, keys=5)
    want = results(given, reference.prefix_attention, lse=False)
    for names in (("prefix_k", "prefix_v"), ("q",), ("v",), ("k", "prefix_v")):
        some = given.with_tensors(**{n: given.tensors[n].detach().requires_grad_() for n in names})
        out = some(triton)
        weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (out * weight.to(out.dtype)).sum().backward()
        assert_same({n: some.tensors[n].grad for n in names}, {n: want[f"d{n}"] for n in names}, 1e-5)


def test_an_index_of_either_width():
    given = call(MIXED, "static", queries=3, keys=7)
    wide = given.with_tensors(**{n: t.long() for n, t in given.tensors.items() if not t.is_floating_point()})
    assert torch.equal(given(triton), wide(triton))


def test_layouts():
    """Rows repeated by expand, a cut of wider rows, and results as they are promised."""
    given = call(MIXED, queries=5, keys=5)
    t = given.tensors
    wide = torch.cat([t["k"], torch.full_like(t["k"], float("nan"))], -1)[..., : t["k"].shape[-1]]
    given = given.with_tensors(q=t["q"][:1].expand_as(t["q"]), k=wide)
    check(given)
    out, lse = given(triton, return_lse=True)
    assert out.shape == (4, 5, 2, 8) and out.is_contiguous() and out.dtype == torch.float32
    assert lse.shape == (4, 2, 5) and lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter's bfloat16 products are wrong
@pytest.mark.parametrize(("queries", "softcap"), [(1, None), (70, None), (70, 1e4)])  # a cap that changes no result
def test_errors_are_bounded_by_those_of_plain_pytorch(queries, softcap, dtype):
    given = call([(3, 40), (50, 64), (0, 0)], queries=queries, keys=70, dims=(64, 64), tokens=120, dtype=dtype)
    exact, bounds = exact_and_bounds(given, lse=False)
    found = results(given, lambda *args, **more: triton(*args, softcap=softcap, **more), lse=False)
    assert_within(found, exact, bounds, (queries, softcap, dtype))
    assert all(x.dtype == dtype for x in found.values())


def test_rows_that_read_beyond_the_arena_stay_inside():
    given = call([(30, 10), (0, 4)], queries=3, keys=3)
    beyond = given.with_tensors(prefix_len=torch.tensor([99, 4]))
    assert torch.equal(beyond(triton), given(triton))


def test_too_large_heads_are_refused():
    with pytest.raises(ImplementationError, match=r"heads have 257 numbers, expected at most 256"):
        call([(0, 1)], queries=1, keys=1, dims=(257, 8))(triton)


def test_opcheck_and_compile():
    given = call(MIXED[:2], queries=2, keys=3, strided=True)
    t = given.leaves()[0].tensors
    args = [t[n] for n in list(t)[:7]]
    torch.library.opcheck(
        torch.ops.fastprompt.prefix_attention.default,
        (*args, *[None] * 6, True, 0.3, None, None, None, True, "triton"),
    )
    torch.compiler.reset()
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    assert_same(results(given, compiled), results(given, triton), 0)
