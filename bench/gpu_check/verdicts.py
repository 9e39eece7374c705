"""Times of a case as ratios and shares of the ceilings, and what its targets say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench import measure
from bench.ceilings import Work
from bench.gpu_check.cases import Target, Timed
from bench.gpu_check.contestants import Entered
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import Setting
from bench.measure import Sample, Spread

MODES = (("graph", "cold"), ("graph", "warm"), ("eager", "cold"), ("eager", "warm"))  # the first is judged
_DTYPE = "bf16"
_CLEAR = 2.0  # times the other floor that one must be for it alone to bind


def tell(timed: Timed, needed: Work, entered: Sequence[Entered], setting: Setting, emit: Emit) -> None:
    """All ratios of a case, its floor, and a verdict for each target."""
    for mode in MODES:
        samples = {one.who.name: one.samples[mode] for one in entered if mode in one.samples}
        for name in samples:
            if name != timed.subject and timed.subject in samples:
                ratio = measure.ratio(samples, name, timed.subject)
                emit("ratio", over=name, under=timed.subject, launch=mode[0], buffers=mode[1], ratio=asdict(ratio.wall))
    held = floor(needed, setting.rates)
    if held is not None:
        emit("floor", flops=needed.flops, bytes=needed.bytes, **held)
    mode = MODES[0] if setting.on_gpu else MODES[2]
    samples = {one.who.name: one.samples[mode] for one in entered if mode in one.samples}
    for target in timed.targets:
        judged = judge(target, target.subject or timed.subject, samples, needed, setting)
        emit("verdict", target=target.text, least=target.least, **judged)


def floor(needed: Work, rates: Mapping[str, float]) -> dict[str, Any] | None:
    """The least time the GPU needs for the bytes and the products; None where its ceilings were not measured."""
    if not {"memory", _DTYPE} <= rates.keys():
        return None
    memory, compute = needed.bytes / rates["memory"], needed.flops / rates[_DTYPE]
    bound = "memory" if memory >= _CLEAR * compute else "compute" if compute >= _CLEAR * memory else "both"
    return {"seconds": max(memory, compute), "bound": bound}


def judge(
    target: Target, subject: str, samples: Mapping[str, Sequence[Sample]], needed: Work, setting: Setting
) -> dict[str, Any]:
    """The number that a target is about, against whom, and whether it was met; None where nothing can be said."""
    value, over = _value(target, subject, samples, needed, setting.rates)
    judged = value is not None and not setting.quick
    return {"value": value, "over": over, "met": value >= target.least if judged and value is not None else None}


def _value(
    target: Target, subject: str, samples: Mapping[str, Sequence[Sample]], needed: Work, rates: Mapping[str, float]
) -> tuple[float | None, str]:
    if subject not in samples:
        return None, f"{subject} was not timed"
    if target.seconds is not None:
        return target.seconds / _median(samples[subject]), f"{1e6 * target.seconds:g} us"
    if target.bandwidth:
        if "memory" not in rates:
            return None, "the copy bandwidth was not measured"
        return needed.bytes / _median(samples[subject]) / rates["memory"], "copy bandwidth"
    peers = [name for name in samples if target.matches(name)]
    if not peers:
        return None, "no such peer ran"
    best = min(peers, key=lambda name: _median(samples[name]))
    return measure.ratio(samples, best, subject).wall.median, best


def _median(samples: Sequence[Sample]) -> float:
    return Spread.of([s.wall for s in samples]).median
