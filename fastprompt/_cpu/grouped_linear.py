"""A linear layer of its own for each row, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._cpu import kernels, rows_contiguous
from fastprompt._eager import grouped_linear as eager

# Multiply-adds from which torch's bfloat16 product wins. In units of torch's time, one thread of a Zen 4 took forward
# 0.9 at 6e8 and 1.1 at 2.4e9, backward 0.4 at 2e7, 1.2 at 6e8 and 1.5 at 2.4e9.
_LARGE_FORWARD, _LARGE_BACKWARD = 1e9, 5e7


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, length: Tensor, max_out: int) -> Tensor:
    """`[B, ..., max_out]`, -inf past a row's length."""
    if _left_to_torch(x, max_out, _LARGE_FORWARD):
        kernels.check_grouped_linear(_tokens(x), weight, bias, start, length, max_out)
        return eager.forward(x, weight, bias, start, length, max_out)
    out = x.new_empty(*x.shape[:-1], max_out)
    kernels.grouped_linear(_tokens(out), _tokens(x), weight, bias, start, length)
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
    if _left_to_torch(x, dout.shape[-1], _LARGE_BACKWARD):
        return eager.backward(dout, x, weight, bias, start, length, wanted)
    dx = torch.empty_like(x) if wanted[0] else None
    rows = None if dx is None else _tokens(dx)  # a copy where its dimensions do not fold into three
    dweight = torch.zeros(weight.shape, dtype=torch.float32) if wanted[1] else None
    dbias = torch.zeros(bias.shape, dtype=torch.float32) if wanted[2] and bias is not None else None
    kernels.grouped_linear_backward(
        rows, dweight, dbias, _tokens(rows_contiguous(dout.float())), _tokens(x), weight, start, length
    )
    if dx is not None and rows is not None and rows.data_ptr() != dx.data_ptr():
        dx.copy_(rows.view(dx.shape))
    none = dout.new_empty(0)
    return (
        none if dx is None else dx,
        none if dweight is None else dweight.to(weight.dtype),
        none if dbias is None else dbias.to(weight.dtype),
    )


def _left_to_torch(x: Tensor, max_out: int, large: float) -> bool:
    """Whether this is a product that torch does faster, on a processor with an instruction for bfloat16 products."""
    return x.dtype == torch.bfloat16 and x.numel() * max_out > large and kernels.isa() == "avx512_bf16"


def _tokens(x: Tensor) -> Tensor:
    """`[B, ..., n]` as `[B, M, n]`."""
    return x if x.dim() == 3 else x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
