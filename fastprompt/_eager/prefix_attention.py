"""Prefix attention in plain PyTorch, forward and backward, without expanding a prefix over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._eager import flash, math
from fastprompt._eager.problem import Problem, build
from fastprompt.arguments import PrefixAttention

_FEW_QUERIES = 4  # up to here one joint softmax in float32 beats the fused kernel and its merge


def forward(call: PrefixAttention, plan: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor]:
    """`out [B, N, Hq, Dv]` and `lse [B, Hq, N]` (`[0]` unless needed)."""
    q, pb = call.q, build(call, plan)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse: Tensor | None
    if q.numel() == 0:
        out, lse = q.new_zeros(*q.shape[:3], call.v.shape[3]), q.new_zeros(q.shape[:3], dtype=lse_dtype)
    elif _fused(pb):
        out, lse = flash.forward(pb)
    else:
        out, lse = math.forward(pb, need_lse)
    lse = lse.contiguous() if need_lse and lse is not None else q.new_empty(0, dtype=lse_dtype)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: PrefixAttention,
    plan: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, laid out as these; `[0]` where not wanted."""
    q, pb = call.q, build(call, plan)
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    inputs = (*call[:5], call.sinks, call.bias, call.prefix_bias)
    if q.numel() == 0:
        grads: list[Tensor | None] = [None] * len(inputs)
    elif dlse is None and _fused(pb):
        grads = flash.backward(pb, dout, out, lse, wanted)
    else:
        grads = math.backward(pb, dout, dlse, out, lse, wanted)
    return tuple(
        _place(pb, i, grads[i], x) if wanted[i] and x is not None else q.new_empty(0) for i, x in enumerate(inputs)
    )


def _fused(pb: Problem) -> bool:
    few = pb.q.shape[2] <= _FEW_QUERIES and pb.q.dtype in (torch.float32, torch.float64)
    return not few and flash.serves(pb)


def _place(pb: Problem, i: int, grad: Tensor | None, x: Tensor) -> Tensor:
    """The gradient in the layout and dtype of its input, zeros where own keys were cut away."""
    target = torch.empty_like(x)
    if grad is None:
        return target.zero_()
    if grad.shape == x.shape:
        same = grad.stride() == target.stride() and grad.dtype == target.dtype
        return grad if same else target.copy_(grad)
    axis = 3 if i == 6 else 2
    target.zero_().narrow(axis, pb.first, grad.shape[axis]).copy_(grad)
    return target
