"""Virtual tokens and text embeddings written into one padded tensor, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt._cpu import kernels, rows_contiguous
from fastprompt.arguments import EmbedPrompts


def forward(call: EmbedPrompts) -> Tensor:
    """`[B, out_len, E]`."""
    weight = call.weight
    out = weight.new_empty(call.input_ids.shape[0], call.out_len, weight.shape[1])
    kernels.embed_prompts(out, *_operands(call))
    return out


def backward(dout: Tensor, call: EmbedPrompts, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and `prompts`; `[0]` where not wanted."""
    operands = _operands(call)
    sums = [torch.zeros_like(table) if want else None for table, want in zip(operands[1:3], wanted, strict=True)]
    kernels.embed_prompts_backward(*sums, rows_contiguous(dout), *operands)
    dweight, dprompts = map(_laid_out, sums, (call.weight, call.prompts))
    return dweight, dprompts


def _operands(call: EmbedPrompts) -> tuple[Any, ...]:
    """What the kernels take behind their results."""
    input_ids, weight, prompts, *extents, left, _, scale = call
    return (
        input_ids, rows_contiguous(weight), rows_contiguous(prompts), *extents, left, 1.0 if scale is None else scale,
    )  # fmt: skip


def _laid_out(total: Tensor | None, like: Tensor) -> Tensor:
    """A gradient with the strides of what it belongs to; `[0]` where there is none."""
    if total is None:
        return like.new_empty(0)
    return total if like.stride(-1) == 1 else torch.empty_like(like).copy_(total)
