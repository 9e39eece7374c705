"""Merging two partial attentions, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

_INF = float("inf")


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`out` as `out_a` (contiguous) and `lse` as `lse_a`."""
    share_a, share_b = _shares(lse_a, lse_b)
    mixed = _part(out_a, share_a) + _part(out_b, share_b)
    return mixed.to(out_a.dtype).contiguous(), torch.logaddexp(lse_a, lse_b).contiguous()


def backward(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, laid out as these."""
    share_a, share_b = _shares(lse_a, lse_b)
    dout = dout.to(lse_a.dtype)
    # d out / d share is the difference of the parts, and share_a * share_b the derivative of the share by lse_a
    apart = torch.where(_column(share_a) == 0, 0.0, out_a.to(dout.dtype)) - torch.where(
        _column(share_b) == 0, 0.0, out_b.to(dout.dtype)
    )
    slope = (dout * apart).sum(-1).transpose(1, 2) * share_a * share_b
    grads = (dout * _column(share_a), dlse * share_a + slope, dout * _column(share_b), dlse * share_b - slope)
    inputs = (out_a, lse_a, out_b, lse_b)
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip(inputs, grads, strict=True))  # type: ignore[return-value]


def _shares(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """What each part contributes, `[B, Hq, N]`; both zero where neither saw a key."""
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -_INF, 0.0, top)
    a, b = (lse_a - top).exp(), (lse_b - top).exp()
    total = (a + b).clamp_min_(torch.finfo(a.dtype).tiny)
    return a / total, b / total


def _column(share: Tensor) -> Tensor:
    """`[B, Hq, N]` as `[B, N, Hq, 1]`."""
    return share.transpose(1, 2)[..., None]


def _part(out: Tensor, share: Tensor) -> Tensor:
    column = _column(share)
    return column * torch.where(column == 0, 0.0, out.to(share.dtype))
