"""Which implementation of an op runs, and why.

An implementation is a module with the functions its op calls (see `fastprompt._eager`); it is imported when it is
first used. To add one, call `register` with its op, its name, its module and a function that says why it cannot run.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from fastprompt import env
from fastprompt.errors import ArgumentError, ImplementationError

OPS = ("prefix_attention", "paged_prefix_attention", "embed_prompts", "merge_states", "grouped_linear")
IMPLS = ("reference", "cpu", "triton", "cuda")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # by device type, best first
_NOT_BUILT = {
    "cpu": "the native extension fastprompt._native is not installed",
    "triton": "the Triton kernels fastprompt._triton are not installed",
    "cuda": "the native extension fastprompt._native is not installed with CUDA",
}


@dataclass(frozen=True)
class Implementation:
    """One way to run one op: the module that does it and why it cannot run here (None when it can)."""

    module: str
    obstacle: Callable[[], str | None]


@dataclass(frozen=True)
class Row:
    """One line of `fastprompt info`."""

    op: str
    impl: str
    available: bool
    reason: str


_table: dict[tuple[str, str], Implementation] = {}


def register(op: str, impl: str, module: str, obstacle: Callable[[], str | None] = lambda: None) -> None:
    """Enters an implementation into the table; the module is imported on first use."""
    _table[op, impl] = Implementation(module, obstacle)


def obstacle(op: str, impl: str) -> str | None:
    """Why this implementation of this op cannot run here, or None."""
    entry = _table.get((op, impl))
    if entry is not None:
        return entry.obstacle()
    return _NOT_BUILT.get(impl) or f"{op} has no {impl} implementation"


def choose(op: str, impl: str | None, device_type: str) -> str:
    """The name of the implementation to run.

    Semantics::

        impl or FASTPROMPT_IMPL names one  ->  that one, or an error; never another
        otherwise                          ->  the best available for the device, saying once if a better one failed

    Raises `ArgumentError` for an unknown name and `ImplementationError` for one that cannot run.
    """
    wanted = impl or env.default_impl()
    if wanted is None:
        return _best(op, device_type)
    origin = "impl" if impl else "FASTPROMPT_IMPL"
    if wanted not in IMPLS:
        raise ArgumentError(f"{origin} is {wanted!r}, expected one of {', '.join(IMPLS)}, or None to let {op} choose")
    reason = obstacle(op, wanted)
    if reason:
        raise ImplementationError(
            f"{origin} asks for {wanted!r}, which cannot run {op}: {reason}; use 'reference' or None"
        )
    return wanted


def kernels(op: str, impl: str) -> ModuleType:
    """The module that runs this op; imports it on first use."""
    return _load(_table[op, impl].module)


def explain() -> list[Row]:
    """Every op with every implementation: whether it can run here and why not."""
    rows = []
    for op in OPS:
        for impl in IMPLS:
            reason = obstacle(op, impl)
            rows.append(Row(op, impl, reason is None, reason or "runs here"))
    return rows


def _best(op: str, device_type: str) -> str:
    for impl in _PREFERENCE.get(device_type, ("reference",)):
        reason = obstacle(op, impl)
        if reason is None:
            return impl
        if (op, impl) in _table:
            _say_once(op, impl, reason)
    raise ImplementationError(f"{op} has no implementation that runs on {device_type}")


@cache
def _say_once(op: str, impl: str, reason: str) -> None:
    warnings.warn(f"fastprompt: {op} runs without its {impl} implementation: {reason}", RuntimeWarning, stacklevel=4)


@cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(module)


for _op in OPS:
    register(_op, "reference", f"fastprompt._eager.{_op}")
