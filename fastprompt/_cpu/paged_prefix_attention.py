"""Prefix attention over a paged own cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._cpu import kernels
from fastprompt._cpu.prefix_attention import single
from fastprompt.arguments import PagedPrefixAttention


def forward(
    call: PagedPrefixAttention, plan: Tensor | None, sharing: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, Dv]` and `lse [Hq, tokens]` (`[0]` unless needed)."""
    q, k_cache, v_cache, block_table, q_start, kv_len, *prefixes, sinks, scale, window, softcap = call
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, v_cache.shape[3])
    lse = q.new_empty((heads, tokens) if need_lse else (0,), dtype=torch.float32)
    kernels.prefix_attention(
        plan, out, lse if need_lse else None, q, k_cache, v_cache, *prefixes, single(sinks), None, None, None,
        kv_len, q_start, block_table, True, scale, window or 0, softcap or 0.0,
    )  # fmt: skip
    return out, lse
