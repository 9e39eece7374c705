"""Virtual tokens and text embeddings written into one padded tensor, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt._eager.groups import check_extents
from fastprompt.arguments import EmbedPrompts
from fastprompt.errors import ArgumentError


@dataclass(frozen=True)
class Placement:
    """Where each token lands in the flattened output `[B * length]`, and where it comes from."""

    text_to: Tensor
    text_ids: Tensor
    virtual_to: Tensor
    virtual_from: Tensor


def forward(call: EmbedPrompts) -> Tensor:
    """`[B, out_len, E]`."""
    at, weight, scale = _place(call), call.weight, call.scale
    rows, columns = call.input_ids.shape[0], call.out_len
    out = weight.new_zeros(rows * columns, weight.shape[1])
    text = _look_up(weight, at.text_ids)
    out.index_copy_(0, at.text_to, text if scale is None else text.mul_(scale))
    out.index_copy_(0, at.virtual_to, call.prompts.index_select(0, at.virtual_from).to(weight.dtype))
    return out.view(rows, columns, weight.shape[1])


def backward(dout: Tensor, call: EmbedPrompts, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and `prompts`; `[0]` where not wanted."""
    at, weight, scale = _place(call), call.weight, call.scale
    flat = dout.reshape(-1, weight.shape[1])
    dweight, dprompts = dout.new_empty(0), dout.new_empty(0)
    if wanted[0]:
        text = flat.index_select(0, at.text_to)
        dweight = _sum_into(weight, at.text_ids, text if scale is None else text * scale)
    if wanted[1]:
        dprompts = _sum_into(call.prompts, at.virtual_from, flat.index_select(0, at.virtual_to))
    return dweight, dprompts


def _look_up(weight: Tensor, ids: Tensor) -> Tensor:
    try:
        return weight.index_select(0, ids)
    except IndexError:
        bad = ids[(ids < 0) | (ids >= weight.shape[0])][0]
        raise ArgumentError(f"input_ids holds {bad}, expected 0..{weight.shape[0] - 1}, the rows of weight") from None


def _sum_into(like: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Rows of `values` summed by `index`, in float32 at least and in one order on every run."""
    wide = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros(like.shape, dtype=wide, device=like.device)
    if total.is_cuda:  # index_add_ would add in any order there
        total.index_put_((index,), values.to(wide), accumulate=True)
    else:
        total.index_add_(0, index, values.to(wide))
    return torch.empty_like(like).copy_(total)


def _place(call: EmbedPrompts) -> Placement:
    input_ids, positions, out_len = call.input_ids, call.positions, call.out_len
    rows, columns = input_ids.shape
    device = input_ids.device
    start, length = call.prompt_start.long(), call.prompt_len.long()
    first = torch.zeros_like(length) if call.text_start is None else call.text_start.long().clamp(min=0)
    last = torch.full_like(length, columns) if call.text_len is None else call.text_len.long().clamp(max=columns)
    texts = (last - first).clamp(min=0)
    total = length + texts
    _check(start.tolist(), length.tolist(), total.tolist(), call.prompts.shape[0], out_len)
    base = torch.arange(rows, device=device) * out_len + (out_len - total if call.left else 0)  # of the row's sequence
    width = int(length.max()) if rows else 0
    if positions is not None and positions.shape[1] < width:
        raise ArgumentError(
            f"positions has {positions.shape[1]} columns, the longest prompt has {width} tokens; give a place for each"
        )
    i = torch.arange(width, device=device)
    virtual = i < length[:, None]  # [B, P]
    index = i.expand(rows, width) if positions is None else positions[:, :width].long()
    taken = _taken(index, virtual, total, out_len)
    slot = torch.arange(out_len, device=device)
    free = ~taken & (slot < total[:, None])  # [B, out_len]
    rank = free.cumsum(1) - 1
    text_rows, text_slots = free.nonzero(as_tuple=True)
    return Placement(
        text_to=base[text_rows] + text_slots,
        text_ids=input_ids[text_rows, first[text_rows] + rank[free]],
        virtual_to=(base[:, None] + index)[virtual],
        virtual_from=(start[:, None] + i)[virtual],
    )


def _taken(index: Tensor, virtual: Tensor, total: Tensor, out_len: int) -> Tensor:
    """`[B, out_len]`: sequence slots that hold virtual tokens."""
    bad = virtual & ((index < 0) | (index >= total[:, None]))
    if bool(bad.any()):
        row, i = bad.nonzero()[0].tolist()
        raise ArgumentError(
            f"positions[{row}, {i}] is {int(index[row, i])}, expected 0..{int(total[row]) - 1}, "
            "a place in the row's sequence"
        )
    taken = torch.zeros(index.shape[0], out_len + 1, dtype=torch.bool, device=index.device)
    taken.scatter_(1, torch.where(virtual, index, out_len), True)
    taken = taken[:, :out_len]
    if bool((taken.sum(1) != virtual.sum(1)).any()):
        row = int((taken.sum(1) != virtual.sum(1)).nonzero()[0])
        raise ArgumentError(f"positions[{row}] names a place twice; give every virtual token its own")
    return taken


def _check(starts: list[int], lens: list[int], totals: list[int], tokens: int, out_len: int) -> None:
    check_extents(list(range(len(starts))), starts, lens, tokens, "prompt_start and prompt_len")
    for row, total in enumerate(totals):
        if total > out_len:
            raise ArgumentError(f"row {row} has {total} tokens, out_len is {out_len}; raise out_len")
