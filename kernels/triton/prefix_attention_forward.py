"""The kernel of prefix_attention: one online softmax over a row's prefix and its own keys.

A program takes a tile of queries of one row and key-value head. The query heads of that head are folded into the rows
of the tile: tile row r is query r // GROUP of head r % GROUP.
"""

import triton
import triton.language as tl

from fastprompt._triton.logits import (
    LOG2E,
    add_biases,
    load_rows,
    row_keys,
    scores,
    softmax_result,
    softmax_step,
    store_rows,
    token_pointers,
    visible,
)


@triton.jit
def tile_span(low, high, prefix, total, dropped, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys some query with index low..high sees: begin, end, and between them where whole blocks are seen by all."""
    begin = 0
    whole = 0
    end = total
    whole_end = total
    if CAUSAL:
        end = tl.minimum(total, tl.maximum(prefix, high + 1))
        whole_end = tl.minimum(total, tl.maximum(prefix, low + 1))
    if window is not None:
        begin = _first_seen(low - window + 1, prefix, dropped)
        whole = _first_seen(high - window + 1, prefix, dropped)
        if not CAUSAL:
            end = tl.minimum(end, _end_seen(high + window, prefix, dropped))
            whole_end = tl.minimum(whole_end, _end_seen(low + window, prefix, dropped))
    begin = tl.minimum(begin, end)
    whole = begin + tl.cdiv(tl.maximum(whole - begin, 0), BLOCK) * BLOCK
    whole = tl.minimum(whole, begin + tl.cdiv(end - begin, BLOCK) * BLOCK)
    whole_end = whole + tl.maximum(whole_end - whole, 0) // BLOCK * BLOCK
    return begin, whole, whole_end, end


@triton.jit
def _first_seen(own, prefix, dropped):
    """The first key not further than a window, which is `own` where no keys were dropped."""
    return tl.where(own + dropped < prefix, tl.maximum(own + dropped, 0), tl.maximum(own, prefix))


@triton.jit
def _end_seen(own, prefix, dropped):
    """The end of the keys not further than a window, which is `own` where no keys were dropped."""
    return tl.where(own > prefix, own, tl.minimum(tl.maximum(own + dropped, 0), prefix))


@triton.jit
def _attend(
    out, top, total_weight, q, first, last, arena_k, arena_v, own_k, own_v, steps, row, query,
    bias, prefix_bias, bias_row, prefix_bias_row, bias_step, prefix_bias_step, columns, scale, softcap, window,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys first..last-1 into an online softmax; without MASKED every query sees them all."""
    start, prefix, own, total, dropped = row
    for at in range(first, last, BLOCK_KEYS):
        t = at + tl.arange(0, BLOCK_KEYS)
        k_at = token_pointers(arena_k, own_k, t, prefix, start, own, steps[0], steps[1])
        k = load_rows(k_at, t < total, DIM, BLOCK_D, MASKED)
        logits, _ = scores(q, k, scale, softcap, PRECISION)
        logits = add_biases(
            logits, bias, prefix_bias, bias_row[:, None], prefix_bias_row[:, None], bias_step, prefix_bias_step,
            columns, t[None, :], prefix, total, own,
        )  # fmt: skip
        if MASKED:
            seen = visible(t[None, :], query[:, None], prefix, total, dropped, window, CAUSAL)
            logits = tl.where(seen, logits, -float("inf"))
        weights, shrink, top, total_weight = softmax_step(logits, top, total_weight)
        v_at = token_pointers(arena_v, own_v, t, prefix, start, own, steps[2], steps[3])
        v = load_rows(v_at, t < total, DIM_V, BLOCK_DV, MASKED)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, top, total_weight


@triton.jit
def prefix_attention_fwd_kernel(
    q, k, v, prefix_k, prefix_v, out, lse, prefix_start, prefix_len, kv_start, kv_len, q_start, sinks, bias,
    prefix_bias, q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides, bias_strides,
    prefix_bias_strides, tokens, keys, queries, columns, scale, softcap, window, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, key-value head, tile); later tiles of a row, which see more keys, come first."""
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
    q_at = q + b * q_strides[0] + head * q_strides[1] + i.to(tl.int64) * q_strides[2]
    q_tile = load_rows(q_at, alive, DIM, BLOCK_D, False)

    low = query0 + tile * BLOCK_ROWS // GROUP
    high = query0 + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP, queries - 1)
    begin, whole, whole_end, end = tile_span(low, high, prefix, total, dropped, window, BLOCK_KEYS, CAUSAL)
    arena_k, arena_v = prefix_k + kv_head * prefix_k_strides[0], prefix_v + kv_head * prefix_v_strides[0]
    own_k = k + b * k_strides[0] + kv_head * k_strides[1]
    own_v = v + b * v_strides[0] + kv_head * v_strides[1]
    steps = (prefix_k_strides[1], k_strides[2], prefix_v_strides[1], v_strides[2])
    row = (start, prefix, own, total, dropped)
    bias_row = b * bias_strides[0] + head * bias_strides[1] + i.to(tl.int64) * bias_strides[2]
    prefix_bias_row = (
        b * prefix_bias_strides[0] + head * prefix_bias_strides[1] + i.to(tl.int64) * prefix_bias_strides[2]
    )

    total_out = tl.zeros([BLOCK_ROWS, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        weight = tl.where(top == -float("inf"), 0.0, 1.0)
    if window is not None:
        total_out, top, weight = _attend(
            total_out, top, weight, q_tile, begin, whole, arena_k, arena_v, own_k, own_v, steps, row, query0 + i,
            bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3], columns, scale,
            softcap, window, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, True,
        )  # fmt: skip
    total_out, top, weight = _attend(
        total_out, top, weight, q_tile, whole, whole_end, arena_k, arena_v, own_k, own_v, steps, row, query0 + i,
        bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3], columns, scale,
        softcap, window, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, False,
    )  # fmt: skip
    total_out, top, weight = _attend(
        total_out, top, weight, q_tile, whole_end, end, arena_k, arena_v, own_k, own_v, steps, row, query0 + i,
        bias, prefix_bias, bias_row, prefix_bias_row, bias_strides[3], prefix_bias_strides[3], columns, scale,
        softcap, window, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_KEYS, CAUSAL, PRECISION, True,
    )  # fmt: skip

    found, log = softmax_result(total_out, top, weight)
    heads = kv_heads * GROUP
    out_at = out + ((b * queries + i) * heads + head) * DIM_V
    store_rows(out_at, found, alive, DIM_V, BLOCK_DV)
    if lse is not None:
        tl.store(lse + (b * heads + head) * queries + i, log, mask=alive)
