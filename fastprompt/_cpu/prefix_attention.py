"""Prefix attention, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt._cpu import kernels
from fastprompt.arguments import PrefixAttention
from fastprompt.errors import ArgumentError


def forward(call: PrefixAttention, plan: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor]:
    """`out [B, N, Hq, Dv]` and `lse [B, Hq, N]` (`[0]` unless needed)."""
    q = call.q
    rows, heads, queries, _ = q.shape
    out = q.new_empty(rows, queries, heads, call.v.shape[3])
    lse = q.new_empty((rows, heads, queries) if need_lse else (0,), dtype=torch.float32)
    kernels.prefix_attention(plan, out, lse if need_lse else None, *_operands(call))
    return out, lse


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
    q, sinks, biases = call.q, call.sinks, (call.bias, call.prefix_bias)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    targets = [torch.empty_like(x) if w else None for x, w in zip(call[:5], wanted, strict=False)]
    grads = [g if g is None or g.shape[-1] < 2 or g.stride(-1) == 1 else g.new_empty(g.shape) for g in targets]
    logits = [  # a bias is broadcast over logits: its gradient is a sum of theirs
        None if b is None or not w else q.new_zeros(*q.shape[:3], b.shape[3], dtype=torch.float32)
        for b, w in zip(biases, wanted[6:], strict=True)
    ]
    if any(g is not None for g in (*grads, *logits)):
        kernels.prefix_attention_backward(dout, dlse, *grads, *logits, plan, out, lse, *_operands(call))
    none = q.new_empty(0)
    return (
        *(none if t is None or g is None else g if g is t else t.copy_(g) for t, g in zip(targets, grads, strict=True)),
        _sinks(sinks, dout, dlse, out, lse) if sinks is not None and wanted[5] else none,
        *(none if g is None else _like(b, g) for b, g in zip(biases, logits, strict=True)),
    )


def _operands(call: PrefixAttention) -> tuple[Any, ...]:
    """What the kernels take behind the plan, `out` and `lse`."""
    *inputs, sinks, bias, prefix_bias, kv_start, kv_len, q_start, causal, scale, window, softcap = call
    return (
        *inputs, single(sinks), single(bias), single(prefix_bias), kv_start, kv_len, q_start, None,
        causal, scale, window or 0, softcap or 0.0,
    )  # fmt: skip


def single(x: Tensor | None) -> Tensor | None:
    """`x` in float32 with a contiguous last dimension."""
    if x is None:
        return None
    if not x.dtype.is_floating_point:
        raise ArgumentError(f"a bias or sinks are {x.dtype}, expected a floating point dtype")
    x = x.float()
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def _sinks(sinks: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """A sink takes weight from all values and gives none of its own."""
    lost = -(dout.float() * out.float()).sum(-1).transpose(1, 2)  # [B, Hq, N]
    if dlse is not None:
        lost = lost + dlse
    weights = (sinks.float()[:, None] - lse).exp().where(lse > -float("inf"), 0.0)
    return _like(sinks, (weights * lost).sum((0, 2)))


def _like(x: Any, grad: Tensor) -> Tensor:
    """A gradient summed to the shape of its input, in its layout and dtype."""
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape))
