"""The kernels of prefix_attention's gradients that a tile of keys owns: a row's own keys, or an arena's tokens.

Every gradient is written by one program, which sums in one order: the same bits on every run, and no atomics.
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
    visible,
)


@triton.jit
def _gather(
    dk, dv, k, v, t, inside, first, last, b, kv_head, row, query0, q, dout, lse, delta, dout_strides, q_strides,
    bias, prefix_bias, bias_strides, prefix_bias_strides, queries, columns, scale, softcap, window, kv_heads,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what tile rows first..last-1 of a batch row give to the gradients of a tile of keys that are inside."""
    _, prefix, own, total, dropped = row
    for at in range(first, last, BLOCK_ROWS):
        r = at + tl.arange(0, BLOCK_ROWS)
        i = tl.minimum(r // GROUP, queries - 1)
        head = kv_head * GROUP + r % GROUP
        alive = r < queries * GROUP
        place = i.to(tl.int64)
        q_tile = load_rows(
            q + b * q_strides[0] + head * q_strides[1] + place * q_strides[2], alive, DIM, BLOCK_D, False
        )
        dout_tile = load_rows(
            dout + b * dout_strides[0] + place * dout_strides[1] + head * dout_strides[2], alive, DIM_V, BLOCK_DV, False
        )  # fmt: skip
        state = (b * kv_heads * GROUP + head) * queries + i
        logits, bent = scores(k, q_tile, scale, softcap, PRECISION)  # [keys, rows]
        bias_row = b * bias_strides[0] + head * bias_strides[1] + place * bias_strides[2]
        prefix_bias_row = b * prefix_bias_strides[0] + head * prefix_bias_strides[1] + place * prefix_bias_strides[2]
        logits = add_biases(
            logits, bias, prefix_bias, bias_row[None, :], prefix_bias_row[None, :], bias_strides[3],
            prefix_bias_strides[3], columns, t[:, None], prefix, total, own,
        )  # fmt: skip
        seen = inside[:, None] & alive[None, :]
        if MASKED:
            seen = seen & visible(t[:, None], (query0 + i)[None, :], prefix, total, dropped, window, CAUSAL)
        weights = tl.where(seen, tl.exp2(logits - load_lse(lse, state, alive)[None, :]), 0.0)
        if WANT_V:
            dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        if WANT_K:
            slopes = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
            slopes = weights * (slopes - tl.load(delta + state, mask=alive, other=0.0)[None, :])
            if softcap is not None:
                slopes *= 1.0 - bent * bent
            slopes = tl.where(seen, slopes, 0.0)  # a key that nobody reads may hold anything
            dk = tl.dot(slopes.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def prefix_attention_bwd_own_kernel(
    q, k, v, prefix_k, prefix_v, dout, lse, delta, dk, dv, prefix_start, prefix_len, kv_start, kv_len, q_start,
    dout_strides, dk_strides, dv_strides, bias, prefix_bias, q_strides, k_strides, v_strides, prefix_k_strides,
    prefix_v_strides, bias_strides, prefix_bias_strides, tokens, keys, queries, columns, scale, softcap, window,
    kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, key-value head, tile of own keys); padding gets zeros."""
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    start, prefix, own, total, query0, dropped = row_keys(
        b, prefix_start, prefix_len, kv_start, kv_len, q_start, tokens, keys, queries
    )
    row = (start, prefix, own, total, dropped)
    j = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    t = prefix + j - own
    inside = (t >= prefix) & (t < total)
    t = tl.where(inside, t, prefix)
    place = j.to(tl.int64)
    k_tile = load_rows(k + b * k_strides[0] + kv_head * k_strides[1] + place * k_strides[2], inside, DIM, BLOCK_D, True)
    v_tile = load_rows(
        v + b * v_strides[0] + kv_head * v_strides[1] + place * v_strides[2], inside, DIM_V, BLOCK_DV, True
    )

    low = tl.maximum(prefix + tile * BLOCK_KEYS - own, prefix)  # first and last key of the tile
    high = tl.minimum(prefix + tile * BLOCK_KEYS + BLOCK_KEYS - 1 - own, total - 1)
    first, last = 0, queries
    whole = 0
    if CAUSAL:
        first = tl.maximum(low - query0, 0)
        whole = tl.maximum(high - query0, 0)
    if window is not None:
        last = tl.minimum(queries, high + window - query0)
        whole = last
        if not CAUSAL:
            first = tl.maximum(low - window + 1 - query0, 0)
    last = tl.where(low <= high, last, 0) * GROUP
    first = first * GROUP // BLOCK_ROWS * BLOCK_ROWS
    whole = tl.minimum(tl.cdiv(whole * GROUP, BLOCK_ROWS) * BLOCK_ROWS, tl.maximum(last, first))
    dk_tile = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_KEYS, BLOCK_DV], tl.float32)
    if CAUSAL or window is not None:
        dk_tile, dv_tile = _gather(
            dk_tile, dv_tile, k_tile, v_tile, t, inside, first, whole, b, kv_head, row, query0, q, dout, lse, delta,
            dout_strides, q_strides, bias, prefix_bias, bias_strides, prefix_bias_strides, queries, columns, scale,
            softcap, window, kv_heads, dk is not None, dv is not None, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_ROWS, CAUSAL, PRECISION, True,
        )  # fmt: skip
        first = whole
    if window is None:
        dk_tile, dv_tile = _gather(
            dk_tile, dv_tile, k_tile, v_tile, t, inside, first, last, b, kv_head, row, query0, q, dout, lse, delta,
            dout_strides, q_strides, bias, prefix_bias, bias_strides, prefix_bias_strides, queries, columns, scale,
            softcap, window, kv_heads, dk is not None, dv is not None, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_ROWS, CAUSAL, PRECISION, False,
        )  # fmt: skip
    if dk is not None:
        dk_at = dk + b * dk_strides[0] + kv_head * dk_strides[1] + place * dk_strides[2]
        store_rows(dk_at, dk_tile * scale, j < keys, DIM, BLOCK_D)
    if dv is not None:
        dv_at = dv + b * dv_strides[0] + kv_head * dv_strides[1] + place * dv_strides[2]
        store_rows(dv_at, dv_tile, j < keys, DIM_V, BLOCK_DV)


@triton.jit
def prefix_attention_bwd_prefix_kernel(
    q, k, v, prefix_k, prefix_v, dout, lse, delta, dk, dv, prefix_start, prefix_len, kv_start, kv_len, q_start,
    dout_strides, dk_strides, dv_strides, rows, splits, bias, prefix_bias, q_strides, k_strides, v_strides,
    prefix_k_strides, prefix_v_strides, bias_strides, prefix_bias_strides, tokens, keys, queries, columns, scale,
    softcap, window, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of arena tokens, key-value head, part of the batch), which walks the rows that read the tile."""
    tiles = tl.cdiv(tokens, BLOCK_KEYS)
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    part = tl.program_id(0) // tiles // kv_heads
    token = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    place = token.to(tl.int64)
    k_tile = load_rows(
        prefix_k + kv_head * prefix_k_strides[0] + place * prefix_k_strides[1], token < tokens, DIM, BLOCK_D, True
    )
    v_tile = load_rows(
        prefix_v + kv_head * prefix_v_strides[0] + place * prefix_v_strides[1], token < tokens, DIM_V, BLOCK_DV, True
    )
    dk_tile = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_KEYS, BLOCK_DV], tl.float32)
    size = tl.cdiv(rows, splits)
    for at in range(part * size, tl.minimum(part * size + size, rows)):
        b = tl.cast(at, tl.int64)
        start, prefix, own, total, query0, dropped = row_keys(
            b, prefix_start, prefix_len, kv_start, kv_len, q_start, tokens, keys, queries
        )
        low = tl.maximum(tile * BLOCK_KEYS - start, 0)  # first and last key of the tile that this row reads
        high = tl.minimum(tile * BLOCK_KEYS + BLOCK_KEYS - start, prefix) - 1
        t = token - start
        inside = (t >= 0) & (t < prefix)
        first, last = 0, queries
        if window is not None:
            last = tl.minimum(queries, high + window - dropped - query0)
            if not CAUSAL:
                first = tl.maximum(low - window + 1 - dropped - query0, 0)
        last = tl.where(low <= high, last, 0) * GROUP
        dk_tile, dv_tile = _gather(
            dk_tile, dv_tile, k_tile, v_tile, tl.where(inside, t, 0), inside, first * GROUP // BLOCK_ROWS * BLOCK_ROWS,
            last, b, kv_head, (start, prefix, own, total, dropped), query0, q, dout, lse, delta, dout_strides,
            q_strides, bias, prefix_bias, bias_strides, prefix_bias_strides, queries, columns, scale, softcap, window,
            kv_heads, dk is not None, dv is not None, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_ROWS, CAUSAL,
            PRECISION, window is not None,
        )  # fmt: skip
    if dk is not None:
        dk_at = dk + part.to(tl.int64) * dk_strides[0] + kv_head * dk_strides[1] + place * dk_strides[2]
        store_rows(dk_at, dk_tile * scale, token < tokens, DIM, BLOCK_D)
    if dv is not None:
        dv_at = dv + part.to(tl.int64) * dv_strides[0] + kv_head * dv_strides[1] + place * dv_strides[2]
        store_rows(dv_at, dv_tile, token < tokens, DIM_V, BLOCK_DV)
