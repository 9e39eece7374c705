"""Which implementation of an op runs, and why.

An implementation is a module with the functions its op calls (see `fastprompt._eager`); it is imported when it is
first used. To add one, call `register` with its op, its name, its module and a function that says why it cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastprompt import env, native
from fastprompt.errors import ArgumentError, ImplementationError

OPS = ("prefix_attention", "paged_prefix_attention", "embed_prompts", "merge_states", "grouped_linear")
IMPLS = ("reference", "cpu", "triton", "flash", "cuda")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # by device type, best first
_NO_KERNEL = {
    "cpu": "there is no native kernel for it",
    "triton": "there is no Triton kernel for it, or it is not installed",
    "flash": "flash-attn does not compute it",
    "cuda": "there is no CUDA kernel for it",
}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of all but the reference, which takes float64 too
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = {"flash": _HALF, "cuda": _HALF}  # of implementations that take fewer
_DEVICES = {"cpu": "cpu", "triton": "cuda", "flash": "cuda", "cuda": "cuda"}  # types of those that take one
_LARGEST_HEAD = {"triton": 256, "flash": 256}
_PAGED = "paged_prefix_attention"
_READING_TOGETHER = ("cuda", "triton")  # implementations of it that look at which rows share a prompt


@dataclass(frozen=True)
class Implementation:
    """One way to run one op: the module that does it and why it cannot run here (None when it can).

    `extra`: nobody needs to be told where it is not there.
    """

    module: str
    obstacle: Callable[[], str | None]
    extra: bool = False


@dataclass(frozen=True)
class Row:
    """One line of `fastprompt info`."""

    op: str
    impl: str
    available: bool
    reason: str


_table: dict[tuple[str, str], Implementation] = {}
_best_known: dict[tuple[Any, ...], str] = {}  # what was chosen for (op, device, dtypes) where nothing was asked for


def register(
    op: str, impl: str, module: str, obstacle: Callable[[], str | None] = lambda: None, extra: bool = False
) -> None:
    """Enters an implementation into the table; the module is imported on first use."""
    _table[op, impl] = Implementation(module, obstacle, extra)
    _best_known.clear()


def obstacle(op: str, impl: str) -> str | None:
    """Why this implementation of this op cannot run here, or None."""
    entry = _table.get((op, impl))
    if entry is not None:
        return entry.obstacle()
    return _NO_KERNEL.get(impl) or f"{op} has no {impl} implementation"


def choose(op: str, impl: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """The name of the implementation to run with tensors of these dtypes on this device.

    Semantics::

        impl or FASTPROMPT_IMPL names one  ->  that one, or an error; never another
        otherwise                          ->  the best for device and dtypes, saying once if a better one failed

    Raises `ArgumentError` for an unknown name and `ImplementationError` for one that cannot run.
    """
    wanted = impl or env.default_impl()
    if wanted is None:
        return _best(op, device, dtypes)
    origin = "impl" if impl else "FASTPROMPT_IMPL"
    if wanted not in IMPLS:
        raise ArgumentError(f"{origin} is {wanted!r}, expected one of {', '.join(IMPLS)}, or None to let {op} choose")
    reason = obstacle(op, wanted) or _foreign(wanted, device, dtypes)
    if reason:
        raise ImplementationError(
            f"{origin} asks for {wanted!r}, which cannot run {op}: {reason}; use 'reference' or None"
        )
    return wanted


def choose_behind(
    op: str, refused: str, reason: str, impl: str | None, device: torch.device, dtype: torch.dtype
) -> str:
    """What runs a call that `refused`, which was chosen for it, does not take: the next best one.

    Raises `ImplementationError` with the reason where it was asked for.
    """
    if asked(impl):
        raise ImplementationError(f"{refused!r} cannot run {op}: {reason}; use None")
    return _best(op, device, (dtype,), refused)


def asked(impl: str | None) -> bool:
    """Whether a call, or FASTPROMPT_IMPL, names an implementation."""
    return bool(impl or env.default_impl())


def reads_together(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of a paged batch there may read a prompt together, so that its plan is to be built with `queries`.

    Raises as `choose`.
    """
    return choose(_PAGED, None, device, dtype) in _READING_TOGETHER


# What torch.compiler.assume_constant_result sets, without importing the compiler: graphs keep what was chosen for them.
_choosers: tuple[Any, ...] = (choose, choose_behind, asked)
for _chooser in _choosers:
    _chooser._dynamo_marked_constant = True


def fitting_heads(op: str, impl: str | None, chosen: str, *heads: torch.Tensor) -> str:
    """What was chosen, or the reference where it takes no `heads` `[..., D]` so large.

    Raises `ImplementationError` where one that does not take them was asked for.
    """
    if chosen not in _LARGEST_HEAD:
        return chosen
    size, largest = max(x.shape[-1] for x in heads), _LARGEST_HEAD[chosen]
    if size <= largest:
        return chosen
    reason = f"its heads have {size} numbers, expected at most {largest}"
    if asked(impl):
        raise ImplementationError(f"{chosen!r} cannot run {op}: {reason}; use 'reference' or None")
    _say_once(op, chosen, reason)
    return "reference"


def kernels(op: str, impl: str) -> ModuleType:
    """The module that runs this op; imports it on first use."""
    return _load(_table[op, impl].module)


def explain() -> list[Row]:
    """Every op with every implementation: whether it can run here and why not."""
    rows = []
    for op in OPS:
        for impl in IMPLS:
            try:
                reason = obstacle(op, impl)
            except ArgumentError as error:  # an environment variable asks for what is not there
                reason = str(error)
            rows.append(Row(op, impl, reason is None, reason or "runs here"))
    return rows


def _best(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], refused: str | None = None) -> str:
    """The best for device and dtypes that is not the one refused, remembered."""
    known = _best_known.get((op, device, dtypes, refused))
    if known is not None:
        return known
    for impl in _PREFERENCE.get(device.type, ("reference",)):
        if impl == refused or _foreign(impl, device, dtypes):
            continue
        reason = obstacle(op, impl)
        if reason is None:
            _best_known[op, device, dtypes, refused] = impl
            return impl
        entry = _table.get((op, impl))
        if entry is not None and not entry.extra:
            _say_once(op, impl, reason)
    raise ImplementationError(f"{op} has no implementation that runs on {device.type}")


def _foreign(impl: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why such tensors are not for this implementation, or None."""
    if impl == "reference":
        return None
    expected = _DEVICES.get(impl, device.type)
    if impl == "triton" and env.triton_interpreted():
        expected = "cpu"
    if device.type != expected:
        return f"its tensors are on {device.type}, expected {expected}"
    taken = _DTYPES.get(impl, _KERNEL_DTYPES)
    others = [str(dtype) for dtype in dtypes if dtype not in taken]
    return f"it got {others[0]}, expected {', '.join(map(str, taken))}" if others else None


def _triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, or None; Triton itself is not imported to find out."""
    if not _installed("triton"):
        return "triton is not installed"
    if torch.cuda.is_available() or env.triton_interpreted():
        return None
    return "triton is here, but a GPU and its driver are not installed"


def _flash_obstacle() -> str | None:
    """Why flash-attn cannot run here, or None; it is not imported to find out."""
    if not _installed("flash_attn"):
        return "flash-attn is not installed"
    return None if torch.cuda.is_available() else "flash-attn is here, but a GPU and its driver are not installed"


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a mere folder of that name has no origin


_said: set[tuple[str, str]] = set()


def _say_once(op: str, impl: str, reason: str) -> None:
    if (impl, reason) not in _said:
        _said.add((impl, reason))
        warnings.warn(
            f"fastprompt: {op} and others run without their {impl} implementation: {reason}",
            RuntimeWarning,
            stacklevel=5,
        )


@cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


for _op in OPS:
    register(_op, "reference", f"fastprompt._eager.{_op}")
    register(_op, "cpu", f"fastprompt._cpu.{_op}", native.obstacle)
    register(_op, "triton", f"fastprompt._triton.{_op}", _triton_obstacle)
register("prefix_attention", "flash", "fastprompt._flash.prefix_attention", _flash_obstacle)
register(_PAGED, "cuda", f"fastprompt._cuda.{_PAGED}", native.cuda_obstacle, extra=True)
