"""Prefix attention over a paged own cache: rows with equally many queries are one dense call each."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastprompt._eager import prefix_attention
from fastprompt.arguments import PagedPrefixAttention, PrefixAttention
from fastprompt.errors import ArgumentError


def forward(
    call: PagedPrefixAttention, plan: Tensor | None, sharing: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, Dv]` and `lse [Hq, tokens]` (`[0]` unless needed)."""
    q, kv_len, k_cache = call.q, call.kv_len, call.k_cache
    tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(tokens, heads, call.v_cache.shape[3])
    lse = q.new_full((heads, tokens) if need_lse else (0,), -float("inf"), dtype=lse_dtype)
    bounds, lens = call.q_start.tolist(), kv_len.tolist()
    _check(bounds, lens, call.block_table, k_cache, tokens)
    for count, rows in _by_queries(bounds).items():
        whole = len(rows) == len(lens)
        pick = torch.tensor(rows, device=q.device)
        at = torch.tensor([bounds[r] for r in rows], device=q.device)[:, None] + torch.arange(count, device=q.device)
        pages = -(-max(lens[r] for r in rows) // k_cache.shape[1])
        blocks = call.block_table[pick, :pages].long().clamp(0, k_cache.shape[0] - 1)
        k, v = (c[blocks].flatten(1, 2).transpose(1, 2) for c in (k_cache, call.v_cache))  # [R, Hkv, S, d]
        dense = PrefixAttention(
            q[at].transpose(1, 2), k, v, call.prefix_k, call.prefix_v, call.prefix_start[pick], call.prefix_len[pick],
            call.sinks, None, None, None, kv_len[pick], kv_len[pick] - count,
            True, call.scale, call.window, call.softcap,
        )  # fmt: skip
        row_out, row_lse = prefix_attention.forward(dense, plan if whole else None, need_lse)
        out[at] = row_out
        if need_lse:
            lse[:, at] = row_lse.transpose(0, 1)
    return out, lse


def _by_queries(bounds: list[int]) -> dict[int, list[int]]:
    """Rows by how many queries they have; rows without any are left out."""
    rows: dict[int, list[int]] = {}
    for row, (a, b) in enumerate(pairwise(bounds)):
        if b > a:
            rows.setdefault(b - a, []).append(row)
    return rows


def _check(bounds: list[int], lens: list[int], block_table: Tensor, k_cache: Tensor, tokens: int) -> None:
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in pairwise(bounds)):
        raise ArgumentError(f"q_start is {bounds}, expected offsets rising from 0 to the {tokens} queries")
    room = block_table.shape[1] * k_cache.shape[1]
    for row, length in enumerate(lens):
        if length < bounds[row + 1] - bounds[row] or length > room:
            raise ArgumentError(
                f"kv_len[{row}] is {length}, expected at least the row's {bounds[row + 1] - bounds[row]} queries "
                f"and at most the {room} tokens of its block table"
            )
    size, blocks = k_cache.shape[1], k_cache.shape[0]
    ends = torch.tensor(lens, device=block_table.device)[:, None]
    used = torch.arange(block_table.shape[1], device=block_table.device) * size < ends
    if bool((used & ((block_table < 0) | (block_table >= blocks))).any()):
        raise ArgumentError(f"block_table names a block outside 0..{blocks - 1} within some row's kv_len")
