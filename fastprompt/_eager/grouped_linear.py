"""A linear layer of its own for each row, rows of one layer in one product; forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastprompt._eager.groups import Groups, check_extents
from fastprompt.errors import ArgumentError

_INF = float("inf")


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, length: Tensor, max_out: int) -> Tensor:
    """`[B, ..., max_out]`, -inf past a row's length."""
    out = torch.full((*x.shape[:-1], max_out), -_INF, dtype=x.dtype, device=x.device)
    for rows, s, n in _layers(weight, start, length, max_out):
        b = None if bias is None else bias[s : s + n]
        out[rows, ..., :n] = torch.nn.functional.linear(x[rows], weight[s : s + n], b)
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
    wide = torch.promote_types(weight.dtype, torch.float32)
    dx = torch.zeros_like(x) if wanted[0] else None
    dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    dbias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if wanted[2] and bias is not None else None
    for rows, s, n in _layers(weight, start, length, dout.shape[-1]):
        dy = dout[rows][..., :n]
        if dx is not None:
            dx[rows] = dy @ weight[s : s + n]
        if dweight is not None:
            dweight[s : s + n] += dy.flatten(0, -2).mT.to(wide) @ x[rows].flatten(0, -2).to(wide)
        if dbias is not None:
            dbias[s : s + n] += dy.flatten(0, -2).to(wide).sum(0)
    none = dout.new_empty(0)
    return (
        none if dx is None else dx,
        none if dweight is None else torch.empty_like(weight).copy_(dweight),
        none if dbias is None or bias is None else torch.empty_like(bias).copy_(dbias),
    )


def _layers(weight: Tensor, start: Tensor, length: Tensor, max_out: int) -> Iterator[tuple[list[int], int, int]]:
    """The rows of each layer with its first weight row and size; rows without a layer are left out."""
    lens = length.tolist()
    if max(lens, default=0) > max_out:
        row = lens.index(max(lens))
        raise ArgumentError(f"length[{row}] is {lens[row]}, max_out is {max_out}; raise max_out")
    starts = start.tolist()
    check_extents(list(range(len(lens))), starts, lens, weight.shape[0], "start and length")
    yield from (g for g in Groups.build(None, starts, lens, weight.shape[0]) if g[2])
