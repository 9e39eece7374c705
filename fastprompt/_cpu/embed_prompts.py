"""Virtual tokens and text embeddings written into one padded tensor, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._cpu import kernels, rows_contiguous


def forward(
    input_ids: Tensor,
    weight: Tensor,
    prompts: Tensor,
    prompt_start: Tensor,
    prompt_len: Tensor,
    positions: Tensor | None,
    text_start: Tensor | None,
    text_len: Tensor | None,
    left: bool,
    out_len: int,
    scale: float | None,
) -> Tensor:
    """`[B, out_len, E]`."""
    out = weight.new_empty(input_ids.shape[0], out_len, weight.shape[1])
    kernels.embed_prompts(
        out, input_ids, rows_contiguous(weight), rows_contiguous(prompts), prompt_start, prompt_len, positions,
        text_start, text_len, left, 1.0 if scale is None else scale,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompts: Tensor,
    prompt_start: Tensor,
    prompt_len: Tensor,
    positions: Tensor | None,
    text_start: Tensor | None,
    text_len: Tensor | None,
    left: bool,
    out_len: int,
    scale: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and `prompts`; `[0]` where not wanted."""
    tables = rows_contiguous(weight), rows_contiguous(prompts)
    sums = [torch.zeros_like(table) if want else None for table, want in zip(tables, wanted, strict=True)]
    kernels.embed_prompts_backward(
        *sums, rows_contiguous(dout), input_ids, *tables, prompt_start, prompt_len, positions, text_start, text_len,
        left, 1.0 if scale is None else scale,
    )  # fmt: skip
    dweight, dprompts = map(_laid_out, sums, (weight, prompts))
    return dweight, dprompts


def _laid_out(total: Tensor | None, like: Tensor) -> Tensor:
    """A gradient with the strides of what it belongs to; `[0]` where there is none."""
    if total is None:
        return like.new_empty(0)
    return total if like.stride(-1) == 1 else torch.empty_like(like).copy_(total)
