"""Prefix attention in plain PyTorch, forward and backward, without expanding a prefix over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt._eager import flash, math
from fastprompt._eager.problem import Problem, build

_FEW_QUERIES = 4  # up to here one joint softmax in float32 beats the fused kernel and its merge


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_bias: Tensor | None,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    q_start: Tensor | None,
    plan: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """`out [B, N, Hq, Dv]` and `lse [B, Hq, N]` (`[0]` unless needed)."""
    pb = build(
        q, k, v, prefix_k, prefix_v, prefix_start, prefix_len, sinks, bias, prefix_bias,
        kv_start, kv_len, q_start, plan, causal, scale, window, softcap,
    )  # fmt: skip
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse: Tensor | None
    if q.numel() == 0:
        out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=lse_dtype)
    elif _fused(pb):
        out, lse = flash.forward(pb)
    else:
        out, lse = math.forward(pb, need_lse)
    lse = lse.contiguous() if need_lse and lse is not None else q.new_empty(0, dtype=lse_dtype)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_bias: Tensor | None,
    kv_start: Tensor | None,
    kv_len: Tensor | None,
    q_start: Tensor | None,
    plan: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, laid out as these; `[0]` where not wanted."""
    pb = build(
        q, k, v, prefix_k, prefix_v, prefix_start, prefix_len, sinks, bias, prefix_bias,
        kv_start, kv_len, q_start, plan, causal, scale, window, softcap,
    )  # fmt: skip
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    inputs = (q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias)
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
