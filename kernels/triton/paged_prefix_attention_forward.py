"""The kernels of paged_prefix_attention: rows alone with all their keys, rows that read a prefix together, the merge.

A program takes one tile of query rows and one key-value head, as in prefix_attention. Partial results are `slots`
before all else: first a row's parts of the keys it reads alone, then its parts of a prefix read together.
"""

import triton
import triton.language as tl

from fastprompt._triton.logits import (
    LOG2E,
    either,
    load_rows,
    row_extent,
    scores,
    softmax_result,
    softmax_step,
    store_rows,
    visible,
)
from fastprompt._triton.prefix_attention_forward import tile_span


@triton.jit
def _paged_pointers(arena, cache, table, t, prefix, total, start, block_size, arena_step, cache_steps):
    """Where each of a row's keys begins in memory: in the arena, then page by page."""
    own = t - prefix
    page = tl.load(table + own // block_size, mask=(own >= 0) & (t < total), other=0).to(tl.int64)
    from_cache = page * cache_steps[0] + (own % block_size).to(tl.int64) * cache_steps[1]
    return either(arena, cache, (start + t).to(tl.int64) * arena_step, from_cache, t < prefix)


@triton.jit
def _which_row(program, q_start, rows, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BATCH: tl.constexpr):
    """Row of the batch and tile in it that a program has; a row beyond the last where it has none."""
    b = tl.arange(0, BLOCK_BATCH)
    begin = tl.load(q_start + b, mask=b < rows, other=0).to(tl.int32)
    end = tl.load(q_start + b + 1, mask=b < rows, other=0).to(tl.int32)
    ends = tl.cumsum(tl.cdiv(tl.maximum(end - begin, 0) * GROUP, BLOCK_ROWS), 0)
    row = tl.sum(((ends <= program) & (b < rows)).to(tl.int32), 0)
    before = tl.max(tl.where(b < row, ends, 0), 0)
    return row, program - before


@triton.jit
def _shares(tile_of_row, b, count):
    """Whether row b reads its prefix with others; it has a single query then."""
    shares = False
    if tile_of_row is not None:
        shares = (tl.load(tile_of_row + b) >= 0) & (count == 1)
    return shares


@triton.jit
def _part(begin, end, part, parts, least, BLOCK_KEYS: tl.constexpr):
    """A part of the keys begin..end-1: as many blocks as the other parts have, and no fewer keys than `least`."""
    size = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), parts), BLOCK_KEYS) * BLOCK_KEYS, least)
    first = begin + part * size
    return first, tl.minimum(end, first + size)


@triton.jit
def _attend(
    q_tile, query, top, weight, begin, end, extent, arena_k, arena_v, k_cache, v_cache, table, block_size,
    arena_steps, k_strides, v_strides, scale, softcap, window,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin..end-1; without a table, all lie in the arena and are seen."""
    start, prefix = extent
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DV], tl.float32)
    for at in range(begin, end, BLOCK_KEYS):
        t = at + tl.arange(0, BLOCK_KEYS)
        if table is None:
            k_at = arena_k + (start + t).to(tl.int64) * arena_steps[0]
            v_at = arena_v + (start + t).to(tl.int64) * arena_steps[1]
            seen = (t < end)[None, :]
        else:
            k_at = _paged_pointers(
                arena_k, k_cache, table, t, prefix, end, start, block_size, arena_steps[0], k_strides
            )
            v_at = _paged_pointers(
                arena_v, v_cache, table, t, prefix, end, start, block_size, arena_steps[1], v_strides
            )
            seen = visible(t[None, :], query[:, None], prefix, end, 0, window, True)
        k = load_rows(k_at, t < end, DIM, BLOCK_D, True)
        logits, _bent = scores(q_tile, k, scale, softcap, PRECISION)
        weights, shrink, top, weight = softmax_step(tl.where(seen, logits, -float("inf")), top, weight)
        v = load_rows(v_at, t < end, DIM_V, BLOCK_DV, True)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return softmax_result(acc, top, weight)


@triton.jit
def _store_part(found, log, parts_out, parts_lse, slot, place, head, alive, queries, heads, DIM_V: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """A partial state; of one that saw nothing only that it did."""
    at = slot.to(tl.int64) * queries + place
    store_rows(parts_out + (at * heads + head) * DIM_V, found, alive & (log > -float("inf")), DIM_V, BLOCK_DV)
    tl.store(parts_lse + (slot.to(tl.int64) * heads + head) * queries + place, log, mask=alive)


@triton.jit
def _store_whole(found, log, out, lse, place, head, alive, queries, heads, DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A result that nothing is merged into."""
    store_rows(out + (place * heads + head) * DIM_V, found, alive, DIM_V, BLOCK_DV)
    if lse is not None:
        tl.store(lse + head * queries + place, log, mask=alive)


@triton.jit
def _read_alone(
    program, q, k_cache, v_cache, block_table, q_start, kv_len, prefix_k, prefix_v, prefix_start, prefix_len, sinks,
    tile_of_row, out, lse, parts_out, parts_lse, q_strides, k_strides, v_strides, table_step, prefix_k_strides,
    prefix_v_strides, rows, tokens, block_size, queries, scale, softcap, window, kv_heads, parts, least,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of some row, key-value head, part of the keys that the row reads alone)."""
    part = program % parts
    kv_head = (program // parts % kv_heads).to(tl.int64)
    row, tile = _which_row(program // parts // kv_heads, q_start, rows, GROUP, BLOCK_ROWS, BLOCK_BATCH)
    if row < rows:
        b = tl.cast(row, tl.int64)
        begin_q = tl.load(q_start + b).to(tl.int32)
        count = tl.load(q_start + b + 1).to(tl.int32) - begin_q
        start, prefix = row_extent(b, prefix_start, prefix_len, tokens)
        total = prefix + tl.maximum(tl.load(kv_len + b), 0).to(tl.int32)
        query0 = total - count
        r = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        i = tl.minimum(r // GROUP, count - 1)
        head = kv_head * GROUP + r % GROUP
        alive = r < count * GROUP
        place = (begin_q + i).to(tl.int64)
        q_tile = load_rows(q + place * q_strides[0] + head * q_strides[1], alive, DIM, BLOCK_D, False)
        low = query0 + tile * BLOCK_ROWS // GROUP
        high = query0 + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP, count - 1)
        begin, _begin, _end, end = tile_span(low, high, prefix, total, 0, window, BLOCK_KEYS, True)
        shares = _shares(tile_of_row, b, count)
        begin, end = _part(tl.where(shares, prefix, begin), end, part, parts, least, BLOCK_KEYS)

        top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
        weight = tl.zeros([BLOCK_ROWS], tl.float32)
        if sinks is not None:
            top = tl.where(part == 0, tl.load(sinks + head).to(tl.float32) * LOG2E, top)
            weight = tl.where(top == -float("inf"), 0.0, 1.0)
        found, log = _attend(
            q_tile, query0 + i, top, weight, begin, end, (start, prefix), prefix_k + kv_head * prefix_k_strides[0],
            prefix_v + kv_head * prefix_v_strides[0], k_cache + kv_head * k_strides[2],
            v_cache + kv_head * v_strides[2], block_table + b * table_step, block_size,
            (prefix_k_strides[1], prefix_v_strides[1]), k_strides, v_strides, scale, softcap, window,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_ROWS, BLOCK_KEYS, PRECISION,
        )  # fmt: skip
        heads = kv_heads * GROUP
        if parts_out is None:
            _store_whole(found, log, out, lse, place, head, alive, queries, heads, DIM_V, BLOCK_DV)
        elif (parts > 1) | shares:
            _store_part(found, log, parts_out, parts_lse, part, place, head, alive, queries, heads, DIM_V, BLOCK_DV)
        else:
            _store_whole(found, log, out, lse, place, head, alive, queries, heads, DIM_V, BLOCK_DV)


@triton.jit
def _read_together(
    program, q, q_start, prefix_k, prefix_v, prefix_start, prefix_len, tiles, parts_out, parts_lse, q_strides,
    prefix_k_strides, prefix_v_strides, rows, tokens, queries, scale, softcap, kv_heads, own_parts, parts, least,
    SHARERS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (rows of one prompt with their heads, key-value head, part of the prefix)."""
    part = program % parts
    kv_head = (program // parts % kv_heads).to(tl.int64)
    cuts: tl.constexpr = (SHARERS * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS  # programs that share a tile's rows
    cut = program // parts // kv_heads % cuts
    tile = tiles + (program // parts // kv_heads // cuts) * SHARERS
    if tl.load(tile + cut * BLOCK_ROWS // GROUP) >= 0:
        first = tl.minimum(tl.load(tile), rows - 1)  # whatever the plan was made for
        start, prefix = row_extent(first, prefix_start, prefix_len, tokens)
        r = cut * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        b = tl.load(tile + r // GROUP, mask=r < SHARERS * GROUP, other=-1)
        known = (b >= 0) & (b < rows)
        place = tl.load(q_start + b, mask=known, other=0).to(tl.int64)
        end_q = tl.load(q_start + b + 1, mask=known, other=0)
        alive = known & (end_q - place == 1)
        head = kv_head * GROUP + r % GROUP
        q_tile = load_rows(q + place * q_strides[0] + head * q_strides[1], alive, DIM, BLOCK_D, True)
        begin, end = _part(0, prefix, part, parts, least, BLOCK_KEYS)
        top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
        found, log = _attend(
            q_tile, None, top, tl.zeros([BLOCK_ROWS], tl.float32), begin, end, (start, prefix),
            prefix_k + kv_head * prefix_k_strides[0], prefix_v + kv_head * prefix_v_strides[0], None, None, None, None,
            (prefix_k_strides[1], prefix_v_strides[1]), None, None, scale, softcap, None,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_ROWS, BLOCK_KEYS, PRECISION,
        )  # fmt: skip
        _store_part(
            found, log, parts_out, parts_lse, own_parts + part, place, head, alive, queries, kv_heads * GROUP,
            DIM_V, BLOCK_DV,
        )  # fmt: skip


@triton.jit
def paged_prefix_attention_fwd_kernel(
    q, k_cache, v_cache, block_table, q_start, kv_len, prefix_k, prefix_v, prefix_start, prefix_len, sinks,
    tile_of_row, tiles, out, lse, parts_out, parts_lse, q_strides, k_strides, v_strides, table_step, prefix_k_strides,
    prefix_v_strides, rows, tokens, block_size, queries, scale, softcap, window, kv_heads, own_parts, own_least,
    prefix_parts, prefix_least, together,
    SHARERS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SHARED: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first `together` programs read prefixes for several rows each, the others the rest for a row."""
    program = tl.program_id(0)
    if tiles is not None:  # noqa: SIM102 - known when compiled, unlike the next
        if program < together:
            _read_together(
                program, q, q_start, prefix_k, prefix_v, prefix_start, prefix_len, tiles, parts_out, parts_lse,
                q_strides, prefix_k_strides, prefix_v_strides, rows, tokens, queries, scale, softcap, kv_heads,
                own_parts, prefix_parts, prefix_least, SHARERS, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_SHARED,
                BLOCK_KEYS, PRECISION,
            )  # fmt: skip
    if program >= together:
        _read_alone(
            program - together, q, k_cache, v_cache, block_table, q_start, kv_len, prefix_k, prefix_v, prefix_start,
            prefix_len, sinks, tile_of_row, out, lse, parts_out, parts_lse, q_strides, k_strides, v_strides, table_step,
            prefix_k_strides, prefix_v_strides, rows, tokens, block_size, queries, scale, softcap, window, kv_heads,
            own_parts, own_least, GROUP, DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_ROWS, BLOCK_KEYS, BLOCK_BATCH, PRECISION,
        )  # fmt: skip


@triton.jit
def paged_prefix_attention_merge_kernel(
    parts_out, parts_lse, out, lse, q_start, tile_of_row, rows, own_parts, prefix_parts, queries, heads,
    DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_BATCH: tl.constexpr,
):  # fmt: skip
    """Program = (query, some heads): their partial states in order, if they have any."""
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    b = tl.arange(0, BLOCK_BATCH)
    ends = tl.load(q_start + b + 1, mask=b < rows, other=0).to(tl.int32)
    row = tl.sum(((ends <= place) & (b < rows)).to(tl.int32), 0)
    parts = 0
    if row < rows:
        count = tl.load(q_start + row + 1).to(tl.int32) - tl.load(q_start + row).to(tl.int32)
        shares = _shares(tile_of_row, row, count)
        parts = tl.where(shares, own_parts + prefix_parts, tl.where(own_parts > 1, own_parts, 0))
    if parts > 0:
        alive = head < heads
        top = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
        for part in range(0, parts):
            at = (tl.cast(part, tl.int64) * heads + head) * queries + place
            top = tl.maximum(top, tl.load(parts_lse + at, mask=alive, other=0.0))
        safe = tl.where(top == -float("inf"), 0.0, top)
        weight = tl.zeros([BLOCK_HEADS], tl.float32)
        acc = tl.zeros([BLOCK_HEADS, BLOCK_DV], tl.float32)
        for part in range(0, parts):
            slot = tl.cast(part, tl.int64)
            found = tl.load(parts_lse + (slot * heads + head) * queries + place, mask=alive, other=-float("inf"))
            share = tl.exp(found - safe)
            weight += share
            state = parts_out + ((slot * queries + place) * heads + head) * DIM_V
            acc += share[:, None] * load_rows(state, share > 0, DIM_V, BLOCK_DV, True)
        blind = weight == 0
        whole = tl.where(blind, 1.0, weight)
        store_rows(out + (place * heads + head) * DIM_V, acc / whole[:, None], alive, DIM_V, BLOCK_DV)
        if lse is not None:
            tl.store(lse + head * queries + place, tl.where(blind, -float("inf"), safe + tl.log(whole)), mask=alive)
