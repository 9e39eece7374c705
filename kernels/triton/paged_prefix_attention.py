"""Prefix attention over a paged own cache: prefill and decode rows in one launch.

Rows of one query that share a prompt read it together where the plan says so, long rows are cut into parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt import costs
from fastprompt._triton import tiles
from fastprompt._triton.launch import dense, launch
from fastprompt._triton.paged_prefix_attention_forward import (
    paged_prefix_attention_fwd_kernel,
    paged_prefix_attention_merge_kernel,
)
from fastprompt._triton.prefix_attention import FAR
from fastprompt.arguments import PagedPrefixAttention
from fastprompt.plan import SHARERS, sharing_capacity

_OWN_PART, _PREFIX_PART = costs.OWN_PART["triton"], costs.PREFIX_PART


def forward(
    call: PagedPrefixAttention, plan: Tensor | None, sharing: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, Dv]` and `lse [Hq, tokens]` (`[0]` unless needed)."""
    q, k_cache, v_cache, prefix_k, prefix_v = call.q, call.k_cache, call.v_cache, call.prefix_k, call.prefix_v
    window, table, starts = call.window, call.block_table.contiguous(), call.q_start.contiguous()
    (tokens, heads, dim), (_, size, kv_heads, dim_v) = q.shape, v_cache.shape
    rows, group = call.kv_len.shape[0], heads // kv_heads
    out = q.new_empty(tokens, heads, dim_v)
    lse = q.new_empty((heads, tokens) if need_lse else (0,), dtype=torch.float32)
    if tokens == 0:
        return out, lse
    log = lse if need_lse else None
    blocks = tiles.block(dim), tiles.block(dim_v)
    tile = tiles.forward(max(blocks), q.dtype, -(-tokens // max(rows, 1)) * group)
    programs = (tokens * group // tile.rows + rows) * kv_heads  # a bound: rows may end within a tile
    keys = table.shape[1] * size + prefix_k.shape[1]
    parts = costs.parts(programs, keys, _OWN_PART)
    shared, tile = Shared.build(None if window is not None else sharing, prefix_k, group, max(blocks), tile)
    state, logs = _room(out, parts + shared.parts) if parts > 1 or shared.parts else (None, None)
    launch(
        paged_prefix_attention_fwd_kernel, shared.programs + programs * parts, q, tile, q, k_cache, v_cache,
        table, starts, dense(call.kv_len), prefix_k, prefix_v, dense(call.prefix_start), dense(call.prefix_len),
        dense(call.sinks), shared.tile_of_row, shared.tiles, out, log, state, logs, q.stride()[:2],
        k_cache.stride()[:3], v_cache.stride()[:3], table.shape[1], prefix_k.stride()[:2], prefix_v.stride()[:2], rows,
        prefix_k.shape[1], size, tokens, call.scale, call.softcap, None if window is None else min(window, FAR),
        kv_heads, parts, _OWN_PART, shared.parts, _PREFIX_PART, shared.programs,
        SHARERS=SHARERS, GROUP=group, DIM=dim, DIM_V=dim_v, BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
        BLOCK_ROWS=tile.rows, BLOCK_SHARED=shared.rows, BLOCK_KEYS=tile.keys, BLOCK_BATCH=tiles.block(rows),
        PRECISION="ieee",
    )  # fmt: skip
    if state is not None:
        few = min(max(1, 4096 // blocks[1]), tiles.block(heads))
        launch(
            paged_prefix_attention_merge_kernel, tokens * -(-heads // few), q, tiles.Tiles(few, 0, 4, 1), state, logs,
            out, log, starts, shared.tile_of_row, rows, parts, shared.parts, tokens, heads,
            DIM_V=dim_v, BLOCK_DV=blocks[1], BLOCK_HEADS=few, BLOCK_BATCH=tiles.block(rows),
        )  # fmt: skip
    return out, lse


class Shared(NamedTuple):
    """What reads prefixes for several rows: work lists, and how many programs, whatever these hold."""

    tile_of_row: Tensor | None
    tiles: Tensor | None
    rows: int
    parts: int
    programs: int

    @staticmethod
    def build(
        sharing: Tensor | None, prefix_k: Tensor, group: int, dim: int, tile: tiles.Tiles
    ) -> tuple[Shared, tiles.Tiles]:
        """From a plan's lists, and the tile for the launch; `dim` is the larger block of head sizes."""
        capacity = 0 if sharing is None else sharing_capacity(sharing)
        if sharing is None or capacity == sharing.shape[0]:
            return Shared(None, None, 16, 0, 0), tile
        rows, tile = tiles.together(tile, dim, prefix_k.dtype, SHARERS * group)
        each = -(-SHARERS * group // rows) * prefix_k.shape[0]  # programs that read a part for one tile
        likely = -(-capacity // SHARERS)  # tiles, were there few prompts
        parts = costs.parts(likely * each, prefix_k.shape[1], _PREFIX_PART)
        lists = sharing[:capacity], sharing[capacity:]
        return Shared(*lists, rows, parts, lists[1].shape[0] // SHARERS * each * parts), tile


def _room(out: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """For partial states, in float32."""
    tokens, heads, _ = out.shape
    return (
        out.new_empty(slots, *out.shape, dtype=torch.float32),
        out.new_empty(slots, heads, tokens, dtype=torch.float32),
    )
