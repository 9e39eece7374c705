"""Every op in every dtype against float64: small calls with every argument, then real sizes.

What is written is filled with NaN before, gradients are taken, and everything is computed again and must have the same
bits. The timed cases are checked here too, so that all kernels are compiled when they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from bench import attention_baselines as baselines
from bench import ceilings
from bench.attention_check import truth
from bench.attention_inputs import DTYPES, build
from bench.gpu_check import cases, micro
from bench.gpu_check.calls import Right
from bench.gpu_check.grid import GRID
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import OURS, Setting
from bench.measure import CheckFailed
from fastprompt.errors import FastPromptError

_TIMED = "timed case: "
_REAL = "real size: "


def units(setting: Setting) -> Sequence[str]:
    """Those that take longest first."""
    real = [f"{_REAL}{name}, {dtype}" for dtype in ("bf16", "fp16", "fp32") for name in cases.checked(setting)]
    grid = [f"{name}, {dtype}" for dtype in ("bf16", "fp16", "fp32") for name in GRID]
    return [*(f"{_TIMED}{name}" for name in cases.timed(setting)), *real, *grid]


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One call, of every implementation; `CheckFailed` where one is wrong."""
    if unit.startswith(_TIMED):
        return _timed(unit.removeprefix(_TIMED), setting, emit)
    name, _, dtype = unit.rpartition(", ")
    if name.startswith(_REAL):
        return _real(name.removeprefix(_REAL), dtype, setting, emit)
    return _grid(name, dtype, setting, emit)


def _grid(name: str, dtype: str, setting: Setting, emit: Emit) -> None:
    call = GRID[name](DTYPES[dtype]).to(setting.device)
    right = Right.of(call)
    for place, impl in enumerate(setting.impls(call.op, call.dtype)):
        try:
            with poisoned():
                written = call.ours(impl)
        except FastPromptError as error:
            _refused(place, impl, error, emit)
            continue
        errors = right.errors(written)
        _repeat(lambda m=impl: call.ours(m), setting.repeats)
        emit("check", who=impl, errors=errors, repeats=setting.repeats)


def _real(name: str, dtype: str, setting: Setting, emit: Emit) -> None:
    case = cases.checked(setting)[name]
    with torch.no_grad():
        inputs = build(case, dtype, device=setting.device)
        right = truth(case, inputs)
        for place, impl in enumerate(setting.impls("prefix_attention", DTYPES[dtype])):
            entry = baselines.ours(case, impl)
            call = entry.build(inputs)
            try:
                with poisoned():
                    written = entry.named(call())
            except FastPromptError as error:
                _refused(place, impl, error, emit)
                continue
            errors = right.errors(f"{OURS}, {impl}", written, 4.0 if setting.quick else 1.0)
            _repeat(lambda e=entry, c=call: e.named(c()), setting.repeats)
            emit("check", who=impl, errors=errors, repeats=setting.repeats)


def _refused(place: int, impl: str, error: FastPromptError, emit: Emit) -> None:
    """What the op chooses must take every call; other implementations need not."""
    if place == 0:
        raise error
    emit("note", text=f"impl {impl} does not take this call: {error}")


def _timed(name: str, setting: Setting, emit: Emit) -> None:
    """Every contestant of a timed case, once."""
    case = cases.timed(setting)[name].case
    with torch.no_grad():
        inputs = build(case, micro.DTYPE, device=setting.device)
        micro.enter(case, inputs, truth(case, inputs), ceilings.work(case, inputs), setting, emit)


def _repeat(call: Callable[[], Mapping[str, torch.Tensor]], times: int) -> None:
    """The same call gives the same bits every time."""
    first = call()
    for _ in range(times):
        for what, x in call().items():
            if not torch.equal(first[what], x):
                raise CheckFailed(f"{what} differs between runs of the same call")


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
