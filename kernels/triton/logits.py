"""What forward and backward of attention share: which keys a row has, where they lie, who sees them, their logits.

A row's keys are counted by one index t: its prefix, then its real own keys, `0 <= t < total`. Logits are in base 2.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_extent(b, prefix_start, prefix_len, tokens):
    """First arena token and length of row b's prefix, nothing outside the arena."""
    start = tl.minimum(tl.maximum(tl.load(prefix_start + b), 0), tokens).to(tl.int32)
    return start, tl.minimum(tl.maximum(tl.load(prefix_len + b), 0), tokens - start).to(tl.int32)


@triton.jit
def row_keys(b, prefix_start, prefix_len, kv_start, kv_len, q_start, tokens, keys, queries):
    """Of row b: first arena token, prefix length, first real own key, all keys, index of query 0, keys dropped."""
    start, prefix = row_extent(b, prefix_start, prefix_len, tokens)
    first = 0
    last = keys
    own_query = keys - queries
    if kv_start is not None:
        first = tl.load(kv_start + b).to(tl.int32)
    if kv_len is not None:
        last = tl.minimum(tl.load(kv_len + b), keys).to(tl.int32)
    if q_start is not None:
        own_query = tl.load(q_start + b).to(tl.int32)
    own = tl.minimum(tl.maximum(first, 0), keys)
    total = prefix + tl.maximum(last - own, 0)
    return start, prefix, own, total, prefix + own_query - own, own - first


@triton.jit
def token_pointers(arena, own_base, t, prefix, start, own, arena_stride, own_stride):
    """Where each of a row's keys begins in memory."""
    return either(
        arena,
        own_base,
        (start + t).to(tl.int64) * arena_stride,
        (own + t - prefix).to(tl.int64) * own_stride,
        t < prefix,
    )


@triton.jit
def either(arena, own, from_arena, from_own, in_arena):
    """Pointers to numbers of an arena or to own ones.

    A choice of pointers loads 16 bytes at once on NVIDIA chips, where one of distances does not; Triton 3.6 for AMD
    takes distances only.
    """
    if is_hip():
        apart = (own.to(tl.int64) - arena.to(tl.int64)) // (arena.dtype.element_ty.primitive_bitwidth // 8)
        found = arena + tl.where(in_arena, from_arena, apart + from_own)
    else:
        found = tl.where(in_arena, arena + from_arena, own + from_own)
    return found


@triton.jit
def load_rows(at, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of SIZE numbers as `[rows, BLOCK]`, zeros beyond SIZE and, if MASKED, where not inside."""
    d = tl.arange(0, BLOCK)
    pointers = at[:, None] + d[None, :]
    if MASKED and SIZE != BLOCK:
        found = tl.load(pointers, mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
    elif MASKED:
        found = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif SIZE != BLOCK:
        found = tl.load(pointers, mask=(d < SIZE)[None, :], other=0.0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def store_rows(at, value, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of a masked `load_rows`, rounded to what is stored."""
    d = tl.arange(0, BLOCK)
    mask = inside[:, None] & (d < SIZE)[None, :]
    tl.store(at[:, None] + d[None, :], value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def visible(t, query, prefix, total, dropped, window, CAUSAL: tl.constexpr):
    """Whether keys t are seen by the queries with these indices; shapes broadcast."""
    seen = (t < total) & (query == query)
    if CAUSAL:
        seen = seen & ((t < prefix) | (t <= query))
    if window is not None:
        distance = query - t + tl.where(t < prefix, dropped, 0)
        if not CAUSAL:
            distance = tl.abs(distance)
        seen = seen & (distance < window)
    return seen


@triton.jit
def tanh(y):
    """Exact to float32, near zero too, where a quotient of exponentials is not."""
    z = y * y
    near = -0.05376993 + z * (0.02075749 + z * -0.00585643)
    near = y * (1.0 + z * (-0.33333284 + z * (0.13331705 + z * near)))
    e = tl.exp2(-2.0 * LOG2E * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.36, near, tl.where(y < 0, -far, far))


@triton.jit
def scores(a, b, scale, softcap, PRECISION: tl.constexpr):
    """Logits of `a [m, d]` with `b [n, d]` and the tanh they were bent by (the logits themselves if by none)."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if softcap is None:
        logits = product * (scale * LOG2E)
        bent = logits
    else:
        bent = tanh(product * (scale / softcap))
        logits = bent * (softcap * LOG2E)
    return logits, bent


@triton.jit
def add_biases(logits, bias, prefix_bias, bias_row, prefix_bias_row, bias_step, prefix_bias_step, columns, t, prefix,
               total, own):  # fmt: skip
    """Adds to the logits of keys t what stands in the rows of two biases; shapes broadcast."""
    if prefix_bias is not None:
        there = (t < prefix) & (t < columns)
        pointers = prefix_bias + prefix_bias_row + t.to(tl.int64) * prefix_bias_step
        logits += tl.load(pointers, mask=there & (prefix_bias_row >= 0), other=0.0).to(tl.float32) * LOG2E
    if bias is not None:
        there = (t >= prefix) & (t < total)
        pointers = bias + bias_row + (own + t - prefix).to(tl.int64) * bias_step
        logits += tl.load(pointers, mask=there & (bias_row >= 0), other=0.0).to(tl.float32) * LOG2E
    return logits


@triton.jit
def softmax_step(logits, top, total):
    """Takes logits `[rows, keys]` into a softmax.

    Their weights, what shrinks the sums so far, the new maxima, the new sums.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(top - safe)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def softmax_result(acc, top, total):
    """Weighted values and the natural log of the sums; 0 and -inf where nothing was seen."""
    blind = total == 0
    whole = tl.where(blind, 1.0, total)
    return acc / whole[:, None], tl.where(blind, -float("inf"), (top + tl.log2(whole)) / LOG2E)


@triton.jit
def load_lse(lse, at, alive):
    """lse in base 2, +inf where a query sees nothing, so that all its weights are 0."""
    found = tl.load(lse + at, mask=alive, other=float("inf"))
    return tl.where(found == -float("inf"), float("inf"), found * LOG2E)
