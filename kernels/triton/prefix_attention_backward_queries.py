"""The kernels of prefix_attention's gradients that a tile of queries owns: of queries, and of logits for biases.

Weights are computed again from lse; nothing of their size is kept.
"""

import triton
import triton.language as tl

from fastprompt._triton.logits import (
    add_biases,
    load_lse,
    load_rows,
    row_keys,
    scores,
    store_rows,
    token_pointers,
    visible,
)
from fastprompt._triton.prefix_attention_forward import tile_span


@triton.jit
def prefix_attention_bwd_delta_kernel(
    dout, dlse, out, delta, dout_strides, queries, heads, total,
    DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """What softmax subtracts from the slopes of a query's weights: `sum(dout * out) - dlse`, `[B, Hq, N]`."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # as rows of out [B, N, Hq, Dv]
    alive = r < total
    b, i, head = r // (queries * heads), r // heads % queries, r % heads
    out_tile = load_rows(out + r * DIM_V, alive, DIM_V, BLOCK_DV, True).to(tl.float32)
    dout_at = dout + b * dout_strides[0] + i * dout_strides[1] + head * dout_strides[2]
    dout_tile = load_rows(dout_at, alive, DIM_V, BLOCK_DV, True).to(tl.float32)
    found = tl.sum(out_tile * dout_tile, 1)
    at = (b * heads + head) * queries + i
    if dlse is not None:
        found -= tl.load(dlse + at, mask=alive, other=0.0)
    tl.store(delta + at, found, mask=alive)


@triton.jit
def _descend(
    dq, q, dout, lse, delta, first, last, arena_k, arena_v, own_k, own_v, steps, row, query, alive,
    bias, prefix_bias, bias_row, prefix_bias_row, bias_step, prefix_bias_step, columns, d_bias, d_prefix_bias,
    d_bias_row, d_prefix_bias_row, scale, softcap, window,
    WANT_Q: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys first..last-1 give to the gradient of a tile of queries."""
    start, prefix, own, total, dropped = row
    for at in range(first, last, BLOCK_KEYS):
        t = at + tl.arange(0, BLOCK_KEYS)
        k_at = token_pointers(arena_k, own_k, t, prefix, start, own, steps[0], steps[1])
        k = load_rows(k_at, t < total, DIM, BLOCK_D, MASKED)
        logits, bent = scores(q, k, scale, softcap, PRECISION)
        logits = add_biases(
            logits, bias, prefix_bias, bias_row[:, None], prefix_bias_row[:, None], bias_step, prefix_bias_step,
            columns, t[None, :], prefix, total, own,
        )  # fmt: skip
        weights = tl.exp2(logits - lse[:, None])
        if MASKED:
            seen = visible(t[None, :], query[:, None], prefix, total, dropped, window, CAUSAL)
            weights = tl.where(seen, weights, 0.0)
        v_at = token_pointers(arena_v, own_v, t, prefix, start, own, steps[2], steps[3])
        v = load_rows(v_at, t < total, DIM_V, BLOCK_DV, MASKED)
        slopes = weights * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if d_bias is not None:
            there = alive[:, None] & ((t >= prefix) & (t < total))[None, :]
            tl.store(d_bias + d_bias_row[:, None] + (own + t - prefix)[None, :], slopes, mask=there)
        if d_prefix_bias is not None:
            there = alive[:, None] & ((t < prefix) & (t < columns))[None, :]
            tl.store(d_prefix_bias + d_prefix_bias_row[:, None] + t[None, :], slopes, mask=there)
        if softcap is not None:
            slopes *= 1.0 - bent * bent
        if WANT_Q:
            dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def prefix_attention_bwd_queries_kernel(
    q, k, v, prefix_k, prefix_v, dout, lse, delta, dq, d_bias, d_prefix_bias, prefix_start, prefix_len, kv_start,
    kv_len, q_start, dout_strides, dq_strides, bias, prefix_bias, q_strides, k_strides, v_strides, prefix_k_strides,
    prefix_v_strides, bias_strides, prefix_bias_strides, tokens, keys, queries, columns, scale, softcap, window,
    kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, key-value head, tile), as forward. Gradients of biases are those of logits."""
    tiles = tl.cdiv(queries * GROUP, BLOCK_ROWS)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    start, prefix, own, total, query0, dropped = row_keys(
        b, prefix_start, prefix_len, kv_start, kv_len, q_start, tokens, keys, queries
    )
    r = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.minimum(r // GROUP, queries - 1)
    head = kv_head * GROUP + r % GROUP
    alive = r < queries * GROUP
    place = i.to(tl.int64)
    q_tile = load_rows(
        q + b * q_strides[0] + head * q_strides[1] + place * q_strides[2], alive, DIM, BLOCK_D, False
    )  # fmt: skip
    dout_tile = load_rows(
        dout + b * dout_strides[0] + place * dout_strides[1] + head * dout_strides[2], alive, DIM_V, BLOCK_DV, False
    )
    state = (b * kv_heads * GROUP + head) * queries + i
    lse_tile = load_lse(lse, state, alive)
    delta_tile = tl.load(delta + state, mask=alive, other=0.0)

    low = query0 + tile * BLOCK_ROWS // GROUP
    high = query0 + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP, queries - 1)
    begin, whole, whole_end, end = tile_span(low, high, prefix, total, dropped, window, BLOCK_KEYS, CAUSAL)
    arena_k, arena_v = prefix_k + kv_head * prefix_k_strides[0], prefix_v + kv_head * prefix_v_strides[0]
    own_k = k + b * k_strides[0] + kv_head * k_strides[1]
    own_v = v + b * v_strides[0] + kv_head * v_strides[1]
    steps = (prefix_k_strides[1], k_strides[2], prefix_v_strides[1], v_strides[2])
    row = (start, prefix, own, total, dropped)
    bias_row = b * bias_strides[0] + head * bias_strides[1] + place * bias_strides[2]
    prefix_bias_row = b * prefix_bias_strides[0] + head * prefix_bias_strides[1] + place * prefix_bias_strides[2]

    dq_tile = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    if window is not None:
        dq_tile = _descend(
            dq_tile, q_tile, dout_tile, lse_tile, delta_tile, begin, whole, arena_k, arena_v, own_k, own_v, steps, row,
            query0 + i, alive, bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3],
            columns, d_bias, d_prefix_bias, state * keys, state * columns, scale, softcap, window, dq is not None,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, True,
        )  # fmt: skip
    dq_tile = _descend(
        dq_tile, q_tile, dout_tile, lse_tile, delta_tile, whole, whole_end, arena_k, arena_v, own_k, own_v, steps, row,
        query0 + i, alive, bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3],
        columns, d_bias, d_prefix_bias, state * keys, state * columns, scale, softcap, window, dq is not None,
        DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, False,
    )  # fmt: skip
    dq_tile = _descend(
        dq_tile, q_tile, dout_tile, lse_tile, delta_tile, whole_end, end, arena_k, arena_v, own_k, own_v, steps, row,
        query0 + i, alive, bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3],
        columns, d_bias, d_prefix_bias, state * keys, state * columns, scale, softcap, window, dq is not None,
        DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, True,
    )  # fmt: skip
    if dq is not None:
        dq_at = dq + b * dq_strides[0] + head * dq_strides[1] + place * dq_strides[2]
        store_rows(dq_at, dq_tile * scale, alive, DIM, BLOCK_D)
