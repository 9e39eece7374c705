"""prefix_attention by flash-attn, of which a stand-in in plain PyTorch does what the real one promises."""

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from cpu_cases import assert_within, exact_and_bounds
from op_cases import INF, assert_same, attention, results

from fastprompt import dispatch, ops, reference
from fastprompt.errors import ImplementationError
from fastprompt.plan import BatchPlan

EXTENTS = [(10, 9), (3, 5), (0, 0), (3, 5), (30, 4)]
OVERLAPPING = [(3, 8), (5, 8), (3, 4), (7, 2), (3, 8)]
PADDING = {
    "none": {},
    "left": {"kv_start": [0, 2, 6, 1, 3]},
    "right": {"kv_len": [7, 3, 1, 7, 0]},
    "both": {"kv_start": [1, 0, 2, 3, 0], "kv_len": [5, 7, 4, 3, 6]},
    "static": {"kv_len": [4, 5, 6, 7, 3], "q_start": [2, 3, 4, 5, 1]},
    "dropped": {"kv_start": [-3, 0, -1, 0, -2]},
}


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """As version 2.8 documents it: causality from the bottom right, +inf as the lse of a query without keys."""
    total, heads, dim = q.shape
    groups = heads // k.shape[1]
    starts = [c.tolist() for c in (cu_seqlens_q, cu_seqlens_k)]
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(starts[0]) == len(starts[1])
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and k.shape == v.shape and dim <= 256
    assert starts[0][0] == starts[1][0] == 0 and starts[0][-1] == total and starts[1][-1] <= k.shape[0]
    lengths = [[b - a for a, b in pairwise(s)] for s in starts]
    assert all(n >= 0 for n in (*lengths[0], *lengths[1]))
    assert max(lengths[0]) <= max_seqlen_q and max(lengths[1]) <= max_seqlen_k
    if max_seqlen_q == 1 and groups > 1 and dim % 8 == 0:  # queries are folded as if each sequence had one
        q.reshape(len(lengths[0]), k.shape[1], groups, dim)
    out, lse = torch.zeros_like(q), torch.full((heads, total), INF, dtype=torch.float32)
    for i, (n, m) in enumerate(zip(*lengths, strict=True)):
        rows, keys = slice(starts[0][i], starts[0][i] + n), slice(starts[1][i], starts[1][i] + m)
        if not n or not m:
            continue
        logits = torch.einsum("nhd,mhd->hnm", q[rows].double(), k[keys].double().repeat_interleave(groups, 1))
        logits = logits * softmax_scale
        logits = softcap * torch.tanh(logits / softcap) if softcap > 0 else logits
        if causal:
            logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -INF)
        seen = logits.logsumexp(-1)
        weights = (logits - seen[..., None]).exp().nan_to_num(0.0)
        out[rows] = torch.einsum("hnm,mhd->nhd", weights, v[keys].double().repeat_interleave(groups, 1)).to(q.dtype)
        lse[:, rows] = torch.where(seen == -INF, INF, seen).float()
    return (out, lse, None) if return_attn_probs else out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """flash-attn, on the CPU and for every dtype."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None, origin="tests")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    entry = dispatch.Implementation("fastprompt._flash.prefix_attention", lambda: None)
    monkeypatch.setitem(dispatch._table, ("prefix_attention", "flash"), entry)
    monkeypatch.setitem(dispatch._DEVICES, "flash", "cpu")
    monkeypatch.setitem(dispatch._DTYPES, "flash", (torch.float32, torch.float16, torch.bfloat16))
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)


def flash(*args, **more):
    return ops.prefix_attention(*args, **more, impl="flash")


def call(extents=EXTENTS, padding="none", **settings):
    queries = 2 if padding == "static" else 7
    return attention(extents, **{"queries": queries, "keys": 7, "dtype": torch.float32} | settings | PADDING[padding])


def check(given, **more):
    want = results(given.map(torch.Tensor.double), reference.prefix_attention)
    assert_same(results(given, flash, **more), want, 1e-5)


@pytest.mark.parametrize("extents", [EXTENTS, OVERLAPPING, [(0, 0)] * 5, [(20, 9), (0, 9), (4, 3), (9, 1), (8, 1)]])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_oracle(extents, padding, causal):
    check(call(extents, padding, causal=causal))
    check(call(extents, padding, causal=causal, strided=True, softcap=2.0, sinks=True, scale=0.7))


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_and_groups_of_heads(heads, queries):
    check(call(queries=queries, heads=heads))
    check(call([(3, 5)], queries=queries, heads=heads, dims=(16, 16)), plan=BatchPlan.build([3], [5]))


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "tokens"), [(0, 2, 3, 9), (2, 0, 3, 9), (2, 2, 0, 9), (2, 2, 3, 0), (2, 1, 0, 0)]
)
def test_empty_sizes(rows, queries, keys, tokens):
    extents = [(2, 3), (0, 0)] if tokens else [(0, 0), (5, 0)]
    check(call(extents[:rows], queries=queries, keys=keys, tokens=tokens))


def test_padding_may_hold_anything():
    given = call(padding="both")
    j = torch.arange(7)
    padding = ((j < given.tensors["kv_start"][:, None]) | (j >= given.tensors["kv_len"][:, None]))[:, None, :, None]
    dirty = given.with_tensors(**{n: given.tensors[n].masked_fill(padding, float("nan")) for n in ("k", "v")})
    for found, want in zip(dirty(flash, return_lse=True), given(flash, return_lse=True), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_bounded_by_those_of_plain_pytorch(dtype):
    given = call(dtype=dtype, dims=(64, 64))
    exact, bounds = exact_and_bounds(given, lse=False)
    found = results(given, flash, lse=False)
    assert all(x.dtype == dtype for x in found.values())
    assert_within(found, exact, bounds, dtype)


def test_a_prefix_and_strided_keys_are_read_in_place(monkeypatch):
    given = call(strided=True)
    seen = []
    real = sys.modules["flash_attn"].flash_attn_varlen_func
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_varlen_func", lambda *a, **m: (seen.append(a[1:3]), real(*a, **m))[1]
    )
    given(flash)
    places = {t.untyped_storage().data_ptr() for pair in seen for t in pair}
    assert places == {given.tensors[n].untyped_storage().data_ptr() for n in ("k", "v", "prefix_k", "prefix_v")}


def test_it_may_be_what_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("FASTPROMPT_IMPL", "flash")
    given = call()
    assert_same(results(given, ops.prefix_attention), results(given, flash), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "impl 'flash' got window"),
        ({"bias": (1, 1, 1)}, "impl 'flash' got bias"),
        ({"dims": (8, 5)}, "head sizes 8 and 5, expected the same"),
        ({"dims": (264, 264)}, "heads have 264 numbers, expected at most 256"),
    ],
)
def test_what_it_does_not_compute_is_refused(settings, message):
    with pytest.raises(ImplementationError, match=message):
        call(**settings)(flash)


def test_an_old_layout_of_lse_is_refused(monkeypatch):

    def old(q, *_, **__):
        return q, torch.zeros(5, q.shape[1], 7), None

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", old)
    with pytest.raises(ImplementationError, match=r"lse of shape \[5, 4, 7\].*install flash-attn 2.7"):
        call()(flash)


def test_dispatch_says_why_it_cannot_run(monkeypatch):
    monkeypatch.undo()
    assert dispatch.obstacle("merge_states", "flash") == "flash-attn does not compute it"
    assert "not installed" in dispatch.obstacle("prefix_attention", "flash")
    with pytest.raises(ImplementationError, match="flash"):
        call()(flash)
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.obstacle("prefix_attention", "flash") is None
    with pytest.raises(ImplementationError, match="tensors are on cpu, expected cuda"):
        call(dtype=torch.float16)(flash)
    with pytest.raises(ImplementationError, match=r"got torch.float32, expected torch.bfloat16, torch.float16"):
        dispatch.choose("prefix_attention", "flash", torch.device("cuda"), torch.float32)
    assert dispatch.choose("prefix_attention", "flash", torch.device("cuda"), torch.float16) == "flash"
