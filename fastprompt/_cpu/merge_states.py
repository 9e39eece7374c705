"""Merging two partial attentions, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._cpu import kernels, rows_contiguous


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`out` as `out_a` and `lse` as `lse_a`, contiguous."""
    out, lse = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out_a, lse_a))
    kernels.merge_states(out, lse, out_a, lse_a, out_b, lse_b)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, laid out as these."""
    dout = rows_contiguous(dout)
    inputs = (out_a, lse_a, out_b, lse_b)
    dout_a, dlse_a, dout_b, dlse_b = (torch.empty_like(x) for x in inputs)
    kernels.merge_states_backward(dout_a, dlse_a, dout_b, dlse_b, dout, dlse, *inputs)
    return dout_a, dlse_a, dout_b, dlse_b
