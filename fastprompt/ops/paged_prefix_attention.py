"""Prefix attention for serving: packed ragged queries over a paged own cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt import costs, dispatch
from fastprompt._cuda import limits
from fastprompt.arguments import PagedPrefixAttention, schema
from fastprompt.errors import ArgumentError
from fastprompt.ops import _checks
from fastprompt.ops._library import define, straight, unobserved
from fastprompt.plan import BatchPlan


def paged_prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: BatchPlan | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of packed rows over their prefixes and the pages of their own tokens.

    Semantics, for row b with n = q_start[b + 1] - q_start[b] queries::

        k, v = k_cache[block_table[b]], v_cache[block_table[b]]   # its first kv_len[b] tokens
        out[q_start[b] : q_start[b + 1]] = prefix_attention(      # query i has own index kv_len[b] - n + i
            q[q_start[b] : q_start[b + 1]], k, v, prefix_k, prefix_v, prefix_start[b], prefix_len[b])

    Shapes: `q [tokens, Hq, D]`, `k_cache [blocks, block_size, Hkv, D]`, `v_cache [blocks, block_size, Hkv, Dv]`,
    int32 or int64 `block_table [B, max_blocks]` (entries past a row's tokens are not read), `q_start [B + 1]` offsets
    into q, `kv_len [B]` own tokens including the new ones; the rest as in `prefix_attention`. With a `plan` built with
    `queries`, GPU kernels read a prompt once for several rows of one query.
    Returns `out [tokens, Hq, Dv]` and, with `return_lse`, `lse [Hq, tokens]`. For inference: it has no gradients.
    Raises `ArgumentError` for what does not fit or requires gradients, `ImplementationError` for an `impl` that
    cannot run.
    Source: paged caches as in Kwon et al. 2023 (arXiv 2309.06180), section 4.
    """
    _checks.window(window)
    _checks.positive("softcap", softcap)
    call = PagedPrefixAttention(
        q, k_cache, v_cache, block_table, q_start, kv_len, prefix_k, prefix_v, prefix_start, prefix_len, sinks,
        q.shape[-1] ** -0.5 if scale is None else scale, window, softcap,
    )  # fmt: skip
    if _checks.needs_grad(q, k_cache, v_cache, prefix_k, prefix_v, sinks):
        raise ArgumentError(
            "paged_prefix_attention has no gradients and an input requires them; call it under torch.no_grad(), "
            "or train with prefix_attention"
        )
    chosen = dispatch.choose("paged_prefix_attention", impl, q.device, q.dtype)
    if chosen == "cpu" and unobserved(call[:_TENSORS]):
        packed = _checks.plan(plan, kv_len, chosen)
        out, lse = straight("paged_prefix_attention", chosen, partial(_check, call), call, packed, None, return_lse)
    else:
        _check(call)
        if chosen == "cuda" and (reason := _left_by_cuda(call, plan, impl)):
            chosen = dispatch.choose_behind("paged_prefix_attention", "cuda", reason, impl, q.device, q.dtype)
        chosen = dispatch.fitting_heads("paged_prefix_attention", impl, chosen, q, v_cache)
        packed, sharing = _checks.plan(plan, kv_len, chosen), _checks.sharing(plan, q)
        out, lse = torch.ops.fastprompt.paged_prefix_attention.default(*call, packed, sharing, return_lse, chosen)
    return (out, lse) if return_lse else out


def _check(call: PagedPrefixAttention) -> None:
    q, k_cache, v_cache, prefix_k, prefix_v = call.q, call.k_cache, call.v_cache, call.prefix_k, call.prefix_v
    _checks.shape("q", q, (None,) * 3, "[tokens, Hq, D]")
    _checks.shape("k_cache", k_cache, (None, None, None, q.shape[2]), "[blocks, block_size, Hkv, D]")
    blocks, size, kv_heads, dim = k_cache.shape
    _checks.shape("v_cache", v_cache, (blocks, size, kv_heads, None), "[blocks, block_size, Hkv, Dv]")
    _checks.shape("prefix_k", prefix_k, (kv_heads, None, dim), "[Hkv, T, D]")
    _checks.shape("prefix_v", prefix_v, (kv_heads, prefix_k.shape[1], v_cache.shape[3]), "[Hkv, T, Dv]")
    _checks.heads(q.shape[1], kv_heads)
    _checks.floats({"q": q, "k_cache": k_cache, "v_cache": v_cache, "prefix_k": prefix_k, "prefix_v": prefix_v})
    _checks.index("kv_len", call.kv_len, (None,), "[B]", q)
    rows = call.kv_len.shape[0]
    _checks.index("q_start", call.q_start, (rows + 1,), "[B + 1]", q)
    _checks.index("block_table", call.block_table, (rows, None), "[B, max_blocks]", q)
    _checks.index("prefix_start", call.prefix_start, (rows,), "[B]", q)
    _checks.index("prefix_len", call.prefix_len, (rows,), "[B]", q)
    _checks.sinks(call.sinks, q.shape[1], q)


def _left_by_cuda(call: PagedPrefixAttention, plan: BatchPlan | None, impl: str | None) -> str | None:
    """Why a call is not for the CUDA kernel, or None: it does not take it or, unless asked for, another costs less."""
    problem = limits.problem(call, plan)
    if problem or plan is None or plan.decoding is None or dispatch.asked(impl) or torch.compiler.is_compiling():
        return problem
    (_, heads, dim), (_, size, kv_heads, _) = call.q.shape, call.k_cache.shape
    (rows, blocks), (prompts, tokens) = call.block_table.shape, plan.decoding
    shape = costs.Decode(
        rows, max(prompts, 1), tokens // max(prompts, 1), blocks * size, heads, kv_heads, dim, call.q.itemsize
    )
    return costs.cheaper_than_cuda(costs.table(call.q.device), shape, plan.sharing is not None and call.window is None)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    kernels = dispatch.kernels("paged_prefix_attention", args[-1])
    return kernels.forward(PagedPrefixAttention._make(args[:-4]), *args[-4:-1])


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    lse = (heads, tokens) if args[-2] else (0,)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(tokens, heads, v_cache.shape[3]), q.new_empty(lse, dtype=dtype)


_ARGUMENTS = schema(PagedPrefixAttention)
_TENSORS = _ARGUMENTS.count("Tensor")  # which come first
define(
    f"paged_prefix_attention({_ARGUMENTS}, Tensor? plan, Tensor? sharing, bool need_lse, str impl) -> (Tensor, Tensor)",
    _run,
    _fake,
)
