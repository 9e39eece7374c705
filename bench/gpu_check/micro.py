"""Attention against its peers, case by case: every contestant checked, then timed in turns, then judged.

A contestant that fails is reported with its error, and the others go on. Where ours fails, no ratio of the case is
shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from bench import ceilings
from bench.attention_baselines import Entry
from bench.attention_cases import Case
from bench.attention_check import Truth, truth
from bench.attention_inputs import DTYPES, Inputs, build
from bench.ceilings import Work
from bench.gpu_check import cases, contestants, timing, verdicts
from bench.gpu_check.contestants import Contestant, Entered
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import Setting
from bench.gpu_check.worker import described
from bench.measure import CheckFailed, Spread

DTYPE = "bf16"
_SLACK = 4.0  # bounds a peer may be off by: it must compute the same thing, how exactly is its own affair
_ROUNDS = 15
_SAMPLE = 1e-3  # seconds of calls that make one sample


def units(setting: Setting) -> Sequence[str]:
    return list(cases.timed(setting))


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One case; `CheckFailed` where ours was wrong before or after it was timed."""
    timed = cases.timed(setting)[unit]
    with torch.no_grad():
        inputs = build(timed.case, DTYPE, device=setting.device)
        right = truth(timed.case, inputs)
        needed = ceilings.work(timed.case, inputs)
        entered = enter(timed.case, inputs, right, needed, setting, emit)
        for mode in verdicts.MODES:
            _time(mode, inputs, right, entered, setting, emit)
            timing.release()
        if timed.case.backward:
            _same_bits(entered[0], inputs, setting, emit)
    verdicts.tell(timed, needed, entered, setting, emit)


def enter(case: Case, inputs: Inputs, right: Truth, needed: Work, setting: Setting, emit: Emit) -> list[Entered]:
    """All contestants that compute the same, each in its quickest form; ours must."""
    entered = []
    for who in contestants.all_of(case, setting):
        if who.obstacle:
            emit("peer", name=who.name, state="not installed", detail=who.obstacle)
            continue
        try:
            entry, errors = _quickest(who, case, inputs, right, setting)
        except Exception as error:
            if who.ours:
                raise
            _failed(who, described(error), setting, emit)
            continue
        emit("check", who=who.name, about=entry.about, errors=errors)
        entered.append(Entered(who, entry, timing.set_count(_read(who, case, needed), setting.device)))
        timing.release()
    return entered


def _read(who: Contestant, case: Case, needed: Work) -> float:
    """Bytes a contestant reads and writes in a call: more than it need where keys are concatenated before it."""
    repeated = 2 * case.rows * (case.prefix + case.keys) * case.heads[1] * case.dim * DTYPES[DTYPE].itemsize
    return float(repeated) if any(fnmatch(who.name, pattern) for pattern in cases.READY) else needed.bytes


def _quickest(
    who: Contestant, case: Case, inputs: Inputs, right: Truth, setting: Setting
) -> tuple[Entry, dict[str, float]]:
    """The form that takes least of those that run and are right; the first one's error where none is."""
    found: list[tuple[float, int, Entry, dict[str, float]]] = []
    problems: list[Exception] = []
    for i, entry in enumerate(who.forms(case, inputs)):
        try:
            call = entry.build(inputs)
            with who.around():
                errors = _check(who, entry, call(), right, setting)
                taken = min(timing.seconds(call, setting.device) for _ in range(3))
        except Exception as error:
            problems.append(error)
            if setting.on_gpu:
                torch.cuda.synchronize()  # raises where the device is lost
            continue
        found.append((taken, i, entry, errors))
    if not found:
        raise problems[0] if problems else RuntimeError("it has no form for this case")
    _, _, entry, errors = min(found, key=lambda one: one[:2])
    return entry, errors


def _check(who: Contestant, entry: Entry, result: Any, right: Truth, setting: Setting) -> dict[str, float]:
    slack = 1.0 if who.ours and not setting.quick else _SLACK
    return right.errors(f"{who.name} ({entry.about})", entry.named(result), slack)


def _time(
    mode: tuple[str, str], inputs: Inputs, right: Truth, entered: list[Entered], setting: Setting, emit: Emit
) -> None:
    """One interleaved run of all contestants in a mode; each result is poisoned, written again and checked."""
    launch, buffers = mode
    if launch == "graph" and not setting.on_gpu:
        return
    least = _SAMPLE / 100 if setting.quick else _SAMPLE
    make = timing.graph if launch == "graph" else timing.eager
    sets = [inputs]
    ready: dict[str, timing.Timed] = {}
    for one in entered:
        wanted = one.sets if buffers == "cold" else 1
        while len(sets) < wanted:
            sets.append(inputs.copy())
        try:
            runs = [one.entry.build(x) for x in sets[:wanted]]
            timed = make(runs, setting.device, least, one.who.around)
            _written(one, timed, right, setting)
            ready[one.who.name] = timed
        except Exception as error:
            if one.who.ours:
                raise
            _failed(one.who, f"{launch}, {buffers}: {described(error)}", setting, emit)
    samples = timing.interleave(ready, 2 if setting.quick else _ROUNDS, setting.device)
    for one in entered:
        name = one.who.name
        if name in samples:
            try:
                _check(one.who, one.entry, ready[name].result(), right, setting)
            except CheckFailed as error:
                if one.who.ours:
                    raise
                _failed(one.who, f"{launch}, {buffers}, after it was timed: {error}", setting, emit)
                continue
            one.samples[mode] = samples[name]
            spread = Spread.of([s.wall for s in samples[name]])
            emit(
                "time", name=name, launch=launch, buffers=buffers, seconds=asdict(spread),
                calls=ready[name].calls, sets=one.sets if buffers == "cold" else 1,
            )  # fmt: skip


def _failed(who: Contestant, detail: str, setting: Setting, emit: Emit) -> None:
    """A peer's error is its own affair, unless it takes the device from all others."""
    emit("peer", name=who.name, state="error", detail=detail)
    if setting.on_gpu:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise RuntimeError(f"{who.name} broke the device: {detail}") from error


def _written(one: Entered, timed: timing.Timed, right: Truth, setting: Setting) -> None:
    """The results hold NaN before the last run, and must be right after it."""
    with one.who.around():
        timed.run()
        for x in tensors(timed.result()):
            if x.is_floating_point():
                x.fill_(torch.nan)
        timed.run()
    _check(one.who, one.entry, timed.result(), right, setting)


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result."""
    return [result] if isinstance(result, Tensor) else [x for part in result for x in tensors(part)]


def _same_bits(ours: Entered, inputs: Inputs, setting: Setting, emit: Emit) -> None:
    """Output and gradients, those of the prefix among them, are equal to the last bit every time."""
    call = ours.entry.build(inputs)
    first = {name: x.clone() for name, x in ours.entry.named(call()).items()}
    for _ in range(setting.repeats):
        for name, x in ours.entry.named(call()).items():
            if not torch.equal(x, first[name]):
                raise CheckFailed(f"{name} differs between runs of the same call")
    met = None if setting.quick else True
    text = f"the same bits in {setting.repeats} further runs: {', '.join(first)}"
    emit("verdict", target=text, least=1.0, value=1.0, over="itself", met=met)
