"""The attention over two sets of keys from the attention over each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt.errors import ArgumentError
from fastprompt.ops import _checks
from fastprompt.ops._library import define, differentiate, straight, unobserved


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merges two partial attentions of the same queries.

    Semantics::

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    A part whose lse is -inf saw nothing and adds nothing, whatever its `out` holds; two such parts give 0 and -inf.

    Shapes: `out_a`, `out_b [B, N, Hq, Dv]` of one dtype; natural-log `lse_a`, `lse_b [B, Hq, N]` in float32
    (float64 for float64 outs). Returns `out [B, N, Hq, Dv]` and `lse [B, Hq, N]`, contiguous. Gradients of all four.
    Raises `ArgumentError` for what does not fit and `ImplementationError` for an `impl` that cannot run.
    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867); FlashAttention, Dao et al. 2022, section 3.1.
    """
    tensors = (out_a, lse_a, out_b, lse_b)
    chosen = dispatch.choose("merge_states", impl, out_a.device, out_a.dtype)
    if chosen == "cpu" and not _checks.needs_grad(*tensors) and unobserved(tensors):
        return straight("merge_states", chosen, partial(_check, *tensors), *tensors)
    _check(*tensors)
    return torch.ops.fastprompt.merge_states.default(*tensors, chosen)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    _checks.shape("out_a", out_a, (None,) * 4, "[B, N, Hq, Dv]")
    rows, queries, heads, _ = out_a.shape
    _checks.shape("out_b", out_b, out_a.shape, "[B, N, Hq, Dv]")
    _checks.shape("lse_a", lse_a, (rows, heads, queries), "[B, Hq, N]")
    _checks.shape("lse_b", lse_b, (rows, heads, queries), "[B, Hq, N]")
    _checks.floats({"out_a": out_a, "out_b": out_b})
    want = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.floating(name, lse, out_a)
        if lse.dtype != want:
            raise ArgumentError(f"{name} is {lse.dtype}, expected {want} with outs of {out_a.dtype}")


_TENSORS = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    return dispatch.kernels("merge_states", args[-1]).forward(*args[:-1])


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return dispatch.kernels("merge_states", args[-1]).backward(*args[:-1])


def _fake_backward(dout: Tensor, dlse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in args[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.impl = inputs[4]


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastprompt.merge_states_backward.default(dout, dlse, *ctx.saved_tensors, ctx.impl)
    return (*grads, None)


define(f"merge_states({_TENSORS}, str impl) -> (Tensor, Tensor)", _run, _fake)
define(
    f"merge_states_backward(Tensor dout, Tensor dlse, {_TENSORS}, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
differentiate("merge_states", _backward, _setup)
