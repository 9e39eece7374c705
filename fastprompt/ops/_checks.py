"""Checks of arguments that need no look at tensor values, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int32, torch.int64)


def shape(name: str, x: Tensor, want: Sequence[int | None], layout: str) -> None:
    """`x` has the dimensions of `want`; None takes any size. `layout` is how the documentation writes the shape."""
    if x.dim() == len(want):
        for n, w in zip(x.shape, want, strict=True):
            if w is not None and w != n:
                break
        else:
            return
    sizes = ", ".join("any" if w is None else str(w) for w in want)
    raise ArgumentError(f"{name} has shape {list(x.shape)}, expected {layout} = [{sizes}]")


def floats(named: dict[str, Tensor]) -> None:
    """All are floating point of one dtype, on one device, with a contiguous last dimension."""
    first = next(iter(named))
    dtype, device = named[first].dtype, named[first].device
    if dtype not in _FLOATS:
        raise ArgumentError(f"{first} is {dtype}, expected float32, bfloat16, float16 or float64")
    for name, x in named.items():
        if x.dtype != dtype:
            raise ArgumentError(f"{name} is {x.dtype}, {first} is {dtype}; convert one, an op takes one dtype")
        if x.device != device:
            raise ArgumentError(f"{name} is on {x.device}, {first} is on {device}; move it there")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ArgumentError(
                f"{name} has strides {list(x.stride())}, expected 1 in the last dimension; call .contiguous()"
            )


def floating(name: str, x: Tensor, like: Tensor) -> None:
    """`x` is floating point of any dtype on the device of `like`."""
    if not x.dtype.is_floating_point:
        raise ArgumentError(f"{name} is {x.dtype}, expected a floating point dtype")
    if x.device != like.device:
        raise ArgumentError(f"{name} is on {x.device}, the other tensors are on {like.device}; move it there")


def index(name: str, x: Tensor | None, want: Sequence[int | None], layout: str, like: Tensor) -> None:
    """`x` is None or an int32 or int64 tensor of this shape on the device of `like`."""
    if x is None:
        return
    if x.dtype not in _INDICES:
        raise ArgumentError(f"{name} is {x.dtype}, expected int32 (or int64)")
    if x.shape != want:
        shape(name, x, want, layout)
    if x.device != like.device:
        raise ArgumentError(f"{name} is on {x.device}, the other tensors are on {like.device}; move it there")


def heads(q_heads: int, kv_heads: int) -> None:
    """Query heads are a multiple of key-value heads."""
    if kv_heads < 1 or q_heads % kv_heads:
        raise ArgumentError(f"q has {q_heads} heads, expected a multiple of the {kv_heads} key-value heads")


def positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ArgumentError(f"{name} is {value}, expected a positive number, or None for none")


def window(value: int | None) -> None:
    """`value` is None or a positive number of positions that 64 bits hold."""
    positive("window", value)
    if value is not None and value >= 2**63:
        raise ArgumentError(f"window is {value}, expected less than 2**63, or None for none")


def sinks(x: Tensor | None, q_heads: int, like: Tensor) -> None:
    """`x` is None or one logit a query head."""
    if x is not None:
        floating("sinks", x, like)
        shape("sinks", x, (q_heads,), "[Hq]")


def bias(name: str, x: Tensor | None, q: Tensor, columns: int | None, layout: str) -> None:
    """`x` is None or broadcasts over the rows, heads and queries of `q [B, Hq, N, D]`."""
    if x is None:
        return
    floating(name, x, q)
    fits = x.dim() == 4 and all(n in (1, size) for n, size in zip(x.shape[:3], q.shape[:3], strict=True))
    if not fits or (columns is not None and x.shape[3] != columns):
        size = "any" if columns is None else columns
        raise ArgumentError(
            f"{name} has shape {list(x.shape)}, expected {layout} with B, Hq, N = {list(q.shape[:3])} "
            f"and {size} columns"
        )


def plan(given: BatchPlan | None, lens: Tensor, impl: str) -> Tensor | None:
    """The packed tensor of a plan with room for the rows of `lens` `[B]`, for an implementation that reads it.

    It lies on the host: kernels that do not look at it would only be kept out of captured graphs by it.
    """
    if given is None:
        return None
    if not isinstance(given, BatchPlan):
        raise ArgumentError(f"plan is a {type(given).__name__}, expected a BatchPlan from BatchPlan.build")
    if given.capacity < (rows := lens.shape[0]):
        raise ArgumentError(f"plan has room for {given.capacity} rows, the batch has {rows}; build one for this batch")
    return None if impl in ("triton", "cuda") else given.packed


def sharing(given: BatchPlan | None, like: Tensor) -> Tensor | None:
    """The work lists of a plan, on the device of `like`."""
    if given is None or given.sharing is None:
        return None
    if given.sharing.device != like.device:
        raise ArgumentError(
            f"plan.sharing is on {given.sharing.device}, the other tensors are on {like.device}; build the plan with "
            "that device"
        )
    return given.sharing


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
