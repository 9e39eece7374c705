"""A linear layer of its own for each row, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastprompt._triton import tiles
from fastprompt._triton.launch import dense, launch, placed, rows_contiguous

_BLOCKS = {2: tiles.Tiles(32, 64, 4, 2), 4: tiles.Tiles(16, 32, 4, 1)}  # by bytes of a number
_DEPTH = 32  # of a step of a product


@triton.jit
def _extent(b, start, length, most, size):
    """First weight row and outputs of row b, nothing outside the weight."""
    first = tl.minimum(tl.maximum(tl.load(start + b), 0), size).to(tl.int64)
    return first, tl.minimum(tl.minimum(tl.maximum(tl.load(length + b), 0), most), size - first).to(tl.int32)


@triton.jit
def grouped_linear_fwd_kernel(
    x, weight, bias, start, length, out, x_steps, weight_step, bias_step, size, tokens, most, depth,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, tile of tokens, tile of outputs)."""
    columns, token_tiles = tl.cdiv(most, BLOCK_OUT), tl.cdiv(tokens, BLOCK_TOKENS)
    column = tl.program_id(0) % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(0) // columns % token_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    b = (tl.program_id(0) // columns // token_tiles).to(tl.int64)
    first, outputs = _extent(b, start, length, most, size)
    x_at = x + b * x_steps[0] + token.to(tl.int64) * x_steps[1]
    weight_at = weight + (first + column) * weight_step
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    for at in range(0, depth, BLOCK_DEPTH):
        e = at + tl.arange(0, BLOCK_DEPTH)
        inside = (e < depth)[None, :]
        given = tl.load(x_at[:, None] + e[None, :], mask=(token < tokens)[:, None] & inside, other=0.0)
        layer = tl.load(weight_at[:, None] + e[None, :], mask=(column < outputs)[:, None] & inside, other=0.0)
        total = tl.dot(given, tl.trans(layer), total, input_precision=PRECISION)
    if bias is not None:
        shift = tl.load(bias + (first + column) * bias_step, mask=column < outputs, other=0.0)
        total += shift.to(tl.float32)[None, :]
    total = tl.where((column < outputs)[None, :], total, -float("inf"))
    out_at = out + (b * tokens + token)[:, None] * most + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < most)[None, :])


@triton.jit
def grouped_linear_bwd_input_kernel(
    dout, weight, start, length, dx, dout_steps, weight_step, size, tokens, most, depth,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, tile of tokens, tile of the input's numbers)."""
    parts, token_tiles = tl.cdiv(depth, BLOCK_OUT), tl.cdiv(tokens, BLOCK_TOKENS)
    e = tl.program_id(0) % parts * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(0) // parts % token_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    b = (tl.program_id(0) // parts // token_tiles).to(tl.int64)
    first, outputs = _extent(b, start, length, most, size)
    dout_at = dout + b * dout_steps[0] + token.to(tl.int64) * dout_steps[1]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    for at in range(0, outputs, BLOCK_DEPTH):
        column = at + tl.arange(0, BLOCK_DEPTH)
        slope_mask = (token < tokens)[:, None] & (column < outputs)[None, :]
        slope = tl.load(dout_at[:, None] + column[None, :], mask=slope_mask, other=0.0)
        layer_at = weight + (first + column)[:, None] * weight_step + e[None, :]
        layer = tl.load(layer_at, mask=(column < outputs)[:, None] & (e < depth)[None, :], other=0.0)
        total = tl.dot(slope, layer, total, input_precision=PRECISION)
    dx_at = dx + (b * tokens + token)[:, None] * depth + e[None, :]
    tl.store(dx_at, total.to(dx.dtype.element_ty), mask=(token < tokens)[:, None] & (e < depth)[None, :])


@triton.jit
def grouped_linear_bwd_weight_kernel(
    dout, x, start, length, dweight, dbias, dout_steps, x_steps, rows, size, tokens, most, depth,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program = (tile of weight rows, tile of the input's numbers), which walks the batch rows that use them."""
    parts = tl.cdiv(depth, BLOCK_OUT)
    part = tl.program_id(0) % parts
    e = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    layer_row = tl.program_id(0) // parts * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros([BLOCK_DEPTH, BLOCK_OUT], tl.float32)
    shift = tl.zeros([BLOCK_DEPTH], tl.float32)
    for at in range(0, rows):
        b = tl.cast(at, tl.int64)
        first, outputs = _extent(b, start, length, most, size)
        column = layer_row - first
        used = (column >= 0) & (column < outputs)
        last = tl.where(tl.max(used.to(tl.int32), 0) > 0, tokens, 0)
        for begin in range(0, last, BLOCK_TOKENS):
            token = begin + tl.arange(0, BLOCK_TOKENS)
            slope_at = dout + b * dout_steps[0] + token.to(tl.int64)[None, :] * dout_steps[1] + column[:, None]
            slope = tl.load(slope_at, mask=used[:, None] & (token < tokens)[None, :], other=0.0)
            x_at = x + b * x_steps[0] + token.to(tl.int64)[:, None] * x_steps[1] + e[None, :]
            given = tl.load(x_at, mask=(token < tokens)[:, None] & (e < depth)[None, :], other=0.0)
            total = tl.dot(slope, given, total, input_precision=PRECISION)
            shift += tl.sum(slope.to(tl.float32), 1)
    if dweight is not None:
        dweight_at = dweight + layer_row.to(tl.int64)[:, None] * depth + e[None, :]
        inside = (layer_row < size)[:, None] & (e < depth)[None, :]
        tl.store(dweight_at, total.to(dweight.dtype.element_ty), mask=inside)
    if dbias is not None:  # noqa: SIM102 - known when compiled, unlike the next
        if part == 0:
            tl.store(dbias + layer_row, shift.to(dbias.dtype.element_ty), mask=layer_row < size)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, length: Tensor, max_out: int) -> Tensor:
    """`[B, ..., max_out]`, -inf past a row's length."""
    out = x.new_empty(*x.shape[:-1], max_out)
    rows, weight = _tokens(x), rows_contiguous(weight)
    tile = _BLOCKS[x.dtype.itemsize]
    programs = x.shape[0] * -(-rows.shape[1] // tile.rows) * -(-max_out // tile.keys)
    launch(
        grouped_linear_fwd_kernel, programs, x, tile, rows, weight, bias, dense(start), dense(length),
        out, rows.stride()[:2], weight.stride(0), 0 if bias is None else bias.stride(0), weight.shape[0],
        rows.shape[1], max_out, x.shape[-1], **_blocks(tile),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    length: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; `[0]` where not wanted."""
    slopes, rows, weight_rows = _tokens(rows_contiguous(dout)), _tokens(x), rows_contiguous(weight)
    tile = _BLOCKS[x.dtype.itemsize]
    extents, sizes = (dense(start), dense(length)), (rows.shape[1], dout.shape[-1], x.shape[-1])
    parts = max(1, -(-x.shape[-1] // tile.keys))
    dx = x.new_empty(x.shape) if wanted[0] else None
    dweight = weight.new_empty(weight.shape) if wanted[1] else None
    dbias = weight.new_empty(weight.shape[0]) if wanted[2] and bias is not None else None
    if dx is not None:
        launch(
            grouped_linear_bwd_input_kernel, x.shape[0] * -(-rows.shape[1] // tile.rows) * parts, x, tile, slopes,
            weight_rows, *extents, dx, slopes.stride()[:2], weight_rows.stride(0), weight.shape[0], *sizes,
            **_blocks(tile),
        )  # fmt: skip
    if dweight is not None or dbias is not None:
        launch(
            grouped_linear_bwd_weight_kernel, -(-weight.shape[0] // _DEPTH) * parts, x, tile, slopes, rows, *extents,
            dweight, dbias, slopes.stride()[:2], rows.stride()[:2], x.shape[0], weight.shape[0], *sizes,
            **_blocks(tile),
        )  # fmt: skip
    none = dout.new_empty(0)
    grads = ((dx, x), (dweight, weight), (dbias, bias))
    dx, dweight, dbias = (none if g is None else placed(g, like) for g, like in grads)
    return dx, dweight, dbias


def _blocks(tile: tiles.Tiles) -> dict[str, object]:
    return {"BLOCK_TOKENS": tile.rows, "BLOCK_OUT": tile.keys, "BLOCK_DEPTH": _DEPTH, "PRECISION": "ieee"}


def _tokens(x: Tensor) -> Tensor:
    """`[B, ..., n]` as `[B, M, n]`."""
    return x if x.dim() == 3 else x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
