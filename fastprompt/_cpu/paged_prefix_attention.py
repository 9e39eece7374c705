"""Prefix attention over a paged own cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._cpu import kernels
from fastprompt._cpu.prefix_attention import single


def forward(
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
    sinks: Tensor | None,
    plan: Tensor | None,
    sharing: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, Dv]` and `lse [Hq, tokens]` (`[0]` unless needed)."""
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, v_cache.shape[3])
    lse = q.new_empty((heads, tokens) if need_lse else (0,), dtype=torch.float32)
    kernels.prefix_attention(
        plan, out, lse if need_lse else None, q, k_cache, v_cache, prefix_k, prefix_v, prefix_start, prefix_len,
        single(sinks), None, None, None, kv_len, q_start, block_table, True, scale, window or 0, softcap or 0.0,
    )  # fmt: skip
    return out, lse
