"""Virtual tokens and text embeddings written into one padded tensor, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprompt._triton import tiles
from fastprompt._triton.launch import dense, launch, placed, rows_contiguous
from fastprompt.arguments import EmbedPrompts

_TOKENS = 16  # of a tile
_WIDTH = 128  # most numbers of a token in a tile


@triton.jit
def _row(b, prompt_start, prompt_len, text_start, text_len, tokens, columns, out_len, LEFT: tl.constexpr):
    """Of row b: first arena token, virtual tokens, first text column, text length, slot where the row begins."""
    start = tl.minimum(tl.maximum(tl.load(prompt_start + b), 0), tokens).to(tl.int32)
    virtual = tl.minimum(tl.maximum(tl.load(prompt_len + b), 0), tokens - start).to(tl.int32)
    first = 0
    last = columns
    if text_start is not None:
        first = tl.maximum(tl.load(text_start + b), 0).to(tl.int32)
    if text_len is not None:
        last = tl.minimum(tl.load(text_len + b), columns).to(tl.int32)
    text = tl.maximum(last - first, 0)
    base = 0
    if LEFT:
        base = out_len - virtual - text
    return start, virtual, first, text, base


@triton.jit
def _sources(place, virtual, positions_row, PLACES: tl.constexpr):
    """For each place in a row's sequence its virtual token (or -1) and how many of these stand before it."""
    if positions_row is None:
        found = tl.where((place >= 0) & (place < virtual), place, -1)
        before = tl.minimum(tl.maximum(place, 0), virtual)
    else:
        i = tl.arange(0, PLACES)
        taken = tl.load(positions_row + i, mask=i < virtual, other=-1).to(tl.int32)
        known = (i < virtual)[None, :]
        found = tl.max(tl.where(known & (taken[None, :] == place[:, None]), i[None, :], -1), 1)
        before = tl.sum((known & (taken[None, :] < place[:, None])).to(tl.int32), 1)
    return found, before


@triton.jit
def _text_ids(input_ids, id_steps, b, place, source, before, virtual, first, text, vocabulary):
    """Token id of the text at each place of a row, -1 where there is none."""
    rank = place - before
    there = (source < 0) & (place >= 0) & (place < virtual + text)
    at = input_ids + b * id_steps[0] + (first + rank).to(tl.int64) * id_steps[1]
    found = tl.load(at, mask=there & (rank < text), other=-1)
    return tl.where((found >= 0) & (found < vocabulary), found, -1).to(tl.int64)


@triton.jit
def embed_prompts_fwd_kernel(
    input_ids, weight, prompts, out, prompt_start, prompt_len, positions, text_start, text_len, id_steps, weight_step,
    prompt_step, position_step, scale, tokens, columns, out_len, vocabulary, size,
    LEFT: tl.constexpr, PLACES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = (row of the batch, tile of its slots, tile of a token's numbers)."""
    parts, slot_tiles = tl.cdiv(size, BLOCK_WIDTH), tl.cdiv(out_len, BLOCK_TOKENS)
    e = tl.program_id(0) % parts * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    slot = tl.program_id(0) // parts % slot_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    b = (tl.program_id(0) // parts // slot_tiles).to(tl.int64)
    start, virtual, first, text, base = _row(
        b, prompt_start, prompt_len, text_start, text_len, tokens, columns, out_len, LEFT
    )
    positions_row = positions
    if positions is not None:
        positions_row = positions + b * position_step
    source, before = _sources(slot - base, virtual, positions_row, PLACES)
    ids = _text_ids(input_ids, id_steps, b, slot - base, source, before, virtual, first, text, vocabulary)
    inside = (e < size)[None, :]
    text_at = weight + ids[:, None] * weight_step + e[None, :]
    found = tl.load(text_at, mask=(ids >= 0)[:, None] & inside, other=0.0)
    if scale is not None:
        found = (found.to(tl.float32) * scale).to(weight.dtype.element_ty)
    prompt_at = prompts + (start + source).to(tl.int64)[:, None] * prompt_step + e[None, :]
    soft = tl.load(prompt_at, mask=(source >= 0)[:, None] & inside, other=0.0)
    found = tl.where((source >= 0)[:, None], soft.to(weight.dtype.element_ty), found)
    tl.store(out + (b * out_len + slot)[:, None] * size + e[None, :], found, mask=(slot < out_len)[:, None] & inside)


@triton.jit
def embed_prompts_ids_kernel(
    input_ids, out, prompt_start, prompt_len, positions, text_start, text_len, id_steps, position_step, tokens,
    columns, out_len, vocabulary, LEFT: tl.constexpr, PLACES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The token id of every slot of the output, -1 where there is no text. Program = (row, tile of slots)."""
    slot_tiles = tl.cdiv(out_len, BLOCK_TOKENS)
    slot = tl.program_id(0) % slot_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    b = (tl.program_id(0) // slot_tiles).to(tl.int64)
    _, virtual, first, text, base = _row(
        b, prompt_start, prompt_len, text_start, text_len, tokens, columns, out_len, LEFT
    )
    positions_row = positions
    if positions is not None:
        positions_row = positions + b * position_step
    source, before = _sources(slot - base, virtual, positions_row, PLACES)
    ids = _text_ids(input_ids, id_steps, b, slot - base, source, before, virtual, first, text, vocabulary)
    tl.store(out + b * out_len + slot, ids, mask=slot < out_len)


@triton.jit
def embed_prompts_bwd_prompts_kernel(
    dout, dprompts, prompt_start, prompt_len, positions, text_start, text_len, dout_steps, position_step, rows, tokens,
    columns, out_len, size, LEFT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = (tile of arena tokens, tile of their numbers), which walks the rows of the batch in order."""
    parts = tl.cdiv(size, BLOCK_WIDTH)
    e = tl.program_id(0) % parts * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    token = tl.program_id(0) // parts * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    for at in range(0, rows):
        b = tl.cast(at, tl.int64)
        start, virtual, _, _, base = _row(
            b, prompt_start, prompt_len, text_start, text_len, tokens, columns, out_len, LEFT
        )
        place = token - start
        read = (place >= 0) & (place < virtual)
        if positions is not None:
            place = tl.load(positions + b * position_step + place, mask=read, other=-1).to(tl.int32)
        slot = base + place
        read = read & (slot >= 0) & (slot < out_len)
        dout_at = dout + b * dout_steps[0] + slot.to(tl.int64)[:, None] * dout_steps[1] + e[None, :]
        total += tl.load(dout_at, mask=read[:, None] & (e < size)[None, :], other=0.0).to(tl.float32)
    at_token = dprompts + token.to(tl.int64)[:, None] * size + e[None, :]
    tl.store(at_token, total.to(dprompts.dtype.element_ty), mask=(token < tokens)[:, None] & (e < size)[None, :])


def forward(call: EmbedPrompts) -> Tensor:
    """`[B, out_len, E]`."""
    (rows, columns), (vocabulary, size), out_len = call.input_ids.shape, call.weight.shape, call.out_len
    out = call.weight.new_empty(rows, out_len, size)
    weight, prompts = rows_contiguous(call.weight), rows_contiguous(call.prompts)
    launch(
        embed_prompts_fwd_kernel, rows * -(-out_len // _TOKENS) * -(-size // _WIDTH), out, _TILES,
        call.input_ids, weight, prompts, out, *_extents(call), call.input_ids.stride(), weight.stride(0),
        prompts.stride(0), _width(call), call.scale, prompts.shape[0], columns, out_len, vocabulary, size,
        LEFT=call.left, PLACES=_places(call), BLOCK_TOKENS=_TOKENS, BLOCK_WIDTH=_WIDTH,
    )  # fmt: skip
    return out


def backward(dout: Tensor, call: EmbedPrompts, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and `prompts`; `[0]` where not wanted."""
    (rows, columns), out_len, prompts = call.input_ids.shape, call.out_len, call.prompts
    dout, extents = rows_contiguous(dout), _extents(call)
    dweight, dprompts = dout.new_empty(0), dout.new_empty(0)
    if wanted[0]:
        ids = call.input_ids.new_empty(rows, out_len, dtype=torch.int64)
        launch(
            embed_prompts_ids_kernel, rows * -(-out_len // _TOKENS), dout, _TILES, call.input_ids, ids, *extents,
            call.input_ids.stride(), _width(call), prompts.shape[0], columns, out_len, call.weight.shape[0],
            LEFT=call.left, PLACES=_places(call), BLOCK_TOKENS=_TOKENS,
        )  # fmt: skip
        dweight = _sum_by_id(dout, ids.flatten(), call.weight, call.scale)
    if wanted[1]:
        total = prompts.new_empty(prompts.shape)
        size = prompts.shape[1]
        launch(
            embed_prompts_bwd_prompts_kernel, -(-prompts.shape[0] // _TOKENS) * -(-size // _WIDTH), dout, _TILES,
            dout, total, *extents, dout.stride()[:2], _width(call), rows, prompts.shape[0], columns, out_len,
            size, LEFT=call.left, BLOCK_TOKENS=_TOKENS, BLOCK_WIDTH=_WIDTH,
        )  # fmt: skip
        dprompts = placed(total, prompts)
    return dweight, dprompts


def _extents(call: EmbedPrompts) -> tuple[Tensor | None, ...]:
    """Where a row's virtual tokens and its text come from, and where the former go."""
    return tuple(map(dense, (call.prompt_start, call.prompt_len, call.positions, call.text_start, call.text_len)))


_TILES = tiles.Tiles(_TOKENS, _WIDTH, 4, 1)


def _sum_by_id(dout: Tensor, ids: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    """Gradients of slots summed by token id; slots without text add zeros, to rows apart from each other."""
    values = dout.reshape(-1, weight.shape[1]).float()
    values = values.masked_fill((ids < 0)[:, None], 0.0) * (1.0 if scale is None else scale)
    spread = torch.arange(ids.shape[0], device=ids.device) % max(weight.shape[0], 1)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    total.index_put_((torch.where(ids < 0, spread, ids),), values, accumulate=True)  # sorted first: one order
    return torch.empty_like(weight).copy_(total)


def _width(call: EmbedPrompts) -> int:
    return 0 if call.positions is None else call.positions.shape[1]


def _places(call: EmbedPrompts) -> int:
    """Block of a row's positions."""
    return tiles.block(max(_width(call), 1))
