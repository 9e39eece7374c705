"""A linear layer of its own for each row of a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt.errors import ArgumentError
from fastprompt.ops import _checks
from fastprompt.ops._library import define, differentiate, straight, unobserved


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    length: Tensor,
    *,
    max_out: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Applies to each row the linear layer that its slice of a stacked weight holds.

    Semantics, for row b::

        w, c = weight[start : start + length], bias[start : start + length]
        out[b, ..., :length] = x[b] @ w.T + c
        out[b, ..., length:] = -inf            # logits that cannot win; give their columns no loss

    Shapes: `x [B, ..., E]`, `weight [R, E]`, `bias [R]` or None, int32 or int64 `start`, `length` `[B]`. `max_out`
    defaults to the longest length, which is read from the tensor. Returns `[B, ..., max_out]` in the dtype of x.
    Gradients of x, weight and bias, those of weight and bias summed over the rows that use them.
    Raises `ArgumentError` for what does not fit and `ImplementationError` for an `impl` that cannot run.
    Source: per-task heads as in P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602), section 3.2.
    """
    tensors = (x, weight, bias, start, length)
    if max_out is None:
        _check(*tensors)
        max_out = int(length.max()) if length.numel() else 0
    chosen = dispatch.choose("grouped_linear", impl, x.device, x.dtype)
    if chosen == "cpu" and not _checks.needs_grad(x, weight, bias) and unobserved(tensors):
        return straight("grouped_linear", chosen, partial(_check, *tensors), *tensors, max_out)
    _check(*tensors)
    return torch.ops.fastprompt.grouped_linear.default(*tensors, max_out, chosen)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, length: Tensor) -> None:
    if x.dim() < 2:
        raise ArgumentError(f"x has shape {list(x.shape)}, expected [B, ..., E]")
    _checks.shape("weight", weight, (None, x.shape[-1]), "[R, E]")
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],), "[R]")
    _checks.floats({"x": x, "weight": weight} if bias is None else {"x": x, "weight": weight, "bias": bias})
    _checks.index("start", start, (x.shape[0],), "[B]", x)
    _checks.index("length", length, (x.shape[0],), "[B]", x)


def _run(*args: Any) -> Tensor:
    return dispatch.kernels("grouped_linear", args[-1]).forward(*args[:-1])


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, length: Tensor, max_out: int, impl: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], max_out)


def _run_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.kernels("grouped_linear", args[-1]).backward(*args[:-1])


def _fake_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = args[-2]
    return tuple(
        torch.empty_like(x) if w and x is not None else dout.new_empty(0) for x, w in zip(args[:3], wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.impl = inputs[6]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastprompt.grouped_linear_backward.default(dout, *ctx.saved_tensors, wanted, ctx.impl)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None, None, None)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor start, Tensor length"
define(f"grouped_linear({_TENSORS}, SymInt max_out, str impl) -> Tensor", _run, _fake)
define(
    f"grouped_linear_backward(Tensor dout, {_TENSORS}, bool[] wanted, str impl) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
differentiate("grouped_linear", _backward, _setup)
