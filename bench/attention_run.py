"""One case of prefix attention in one dtype: every contestant checked, then timed in turns, then judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

from bench import attention_baselines as baselines
from bench import ceilings, machine, measure
from bench.attention_baselines import Entry, Form
from bench.attention_cases import Case
from bench.attention_check import Truth, truth
from bench.attention_inputs import Inputs, build
from bench.ceilings import Ceilings, Share
from bench.measure import Contestant, Ratio, Sample, Spread

OURS = "ours"
_SLACK = 4.0  # bounds a baseline may be off by: it must compute the same thing, how exactly is its own affair
_SECONDS = 6.0  # of one interleaved run; slow contestants get fewer rounds
_FEWEST = 5  # rounds all the same
_MOST_SETS = {False: 512, True: 2}  # of inputs that take turns; when quick
_SAMPLE = {False: 5e-3, True: 2e-4}  # seconds of calls that make one sample; when quick
_SHORTEST = 50e-6  # seconds of a floor below which the call's own cost counts and the share has no target
_OF_CEILING = {"memory": 0.7, "compute": 0.6}


@dataclass(frozen=True)
class Settings:
    """How to measure: `clock` is "wall" or "cpu"; what is `quick` judges nothing and is lenient about errors."""

    impl: str
    clock: str
    ceilings: Ceilings
    rounds: int
    rotate: bool | None  # None: as the case says
    quick: bool


@dataclass(frozen=True)
class Verdict:
    """A number and the least it should be; `met` is None where it was not judged."""

    over: str
    value: float
    target: float | None
    met: bool | None


@dataclass(frozen=True)
class Outcome:
    """A case that was green: what it took, how far off it was, and how it compares."""

    case: Case
    dtype: str
    sets: int  # of inputs; 1 is hot
    time: Spread  # seconds of our call on the clock that counts
    about: dict[str, str]
    errors: dict[str, dict[str, float]]
    samples: dict[str, list[Sample]]
    ratios: Sequence[Ratio]
    share: Share
    verdicts: Sequence[Verdict]

    @property
    def quiet(self) -> bool:
        return all(ratio.quiet for ratio in self.ratios)


def run(case: Case, dtype: str, settings: Settings) -> Outcome:
    """Measures a case; raises `CheckFailed` where a contestant is wrong before or after it was timed."""
    inputs = build(case, dtype)
    right = truth(case, inputs)
    needed = ceilings.work(case, inputs)
    entries = _entries(case, inputs, right, settings)
    sets = [inputs, *(inputs.copy() for _ in range(1, _set_count(case, needed.bytes, settings)))]
    last: dict[str, Any] = {}
    contestants = {}
    for name, entry in entries.items():
        size = _concatenated_bytes(case, inputs) if name in ("concatenated", "explicit") else needed.bytes
        turn = _in_turn([entry.build(x) for x in sets[: _set_count(case, size, settings)]])
        calls = measure.calls_for(turn, _SAMPLE[settings.quick])
        contestants[name] = Contestant(turn, partial(last.__setitem__, name), calls=calls)
    samples = measure.interleave(contestants, _rounds(contestants, settings.rounds))
    errors = {name: _check(right, name, entry, last[name], settings) for name, entry in entries.items()}
    ratios = [measure.ratio(samples, name, OURS) for name in entries if name != OURS]
    time = _spread(samples[OURS], settings.clock)
    share = ceilings.share(needed, time.median, settings.ceilings, dtype)
    verdicts = [_judge(case, dtype, ratio, settings) for ratio in ratios]
    verdicts.append(_judge_share(case, dtype, share, settings, all(ratio.quiet for ratio in ratios)))
    about = {name: entry.about for name, entry in entries.items()}
    return Outcome(case, dtype, len(sets), time, about, errors, samples, ratios, share, verdicts)


def _entries(case: Case, inputs: Inputs, right: Truth, settings: Settings) -> dict[str, Entry]:
    """Who takes part, ours first: of each kind of baseline the quickest form, found by a short look."""
    entries = {OURS: baselines.ours(case, settings.impl)}
    _check(right, OURS, entries[OURS], entries[OURS].build(inputs)(), settings)
    forms = {form.about: form for form in baselines.forms(case, inputs.mask, inputs.q.dtype)}
    quickest = _ranked(right, inputs, {n: baselines.concatenated(case, form) for n, form in forms.items()}, settings)
    entries["concatenated"] = baselines.concatenated(case, next(forms[n] for n in quickest if forms[n].sdpa))
    entries["explicit"] = baselines.concatenated(case, next(forms[n] for n in quickest if not forms[n].sdpa))
    entries["expanded"] = baselines.expanded(case, next(forms[n] for n in quickest if _as_peft(forms[n])))
    folded = baselines.folded(case, inputs)
    if folded is not None:
        entries["folded"] = folded
    if settings.impl != "reference":
        entries["reference"] = baselines.ours(case, "reference")
    return entries


def _as_peft(form: Form) -> bool:
    """Whether a form may follow PEFT's concatenation: SDPA, and no second copy of the keys."""
    return form.sdpa and form.repeats == 1


def _ranked(right: Truth, inputs: Inputs, entries: Mapping[str, Entry], settings: Settings) -> list[str]:
    runs = {name: entry.build(inputs) for name, entry in entries.items()}
    for name, entry in entries.items():
        _check(right, name, entry, runs[name](), settings)
    return measure.ranking(runs, settings.clock, _SAMPLE[settings.quick])


def _check(right: Truth, name: str, entry: Entry, result: Any, settings: Settings) -> dict[str, float]:
    held = name in (OURS, "reference") and not settings.quick
    return right.errors(f"{name} ({entry.about})", entry.named(result), 1.0 if held else _SLACK)


def _set_count(case: Case, size: float, settings: Settings) -> int:
    """Sets of inputs of a size that together are twice what the caches hold; one where they shall stay hot."""
    rotate = case.rotate if settings.rotate is None else settings.rotate
    return min(_MOST_SETS[settings.quick], 1 + math.ceil(2 * machine.last_level_cache() / size)) if rotate else 1


def _concatenated_bytes(case: Case, inputs: Inputs) -> int:
    return 2 * case.rows * (case.prefix + case.keys) * case.heads[1] * case.dim * inputs.k.element_size()


def _in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    if len(runs) == 1:
        return runs[0]
    turn = cycle(runs)
    return lambda: next(turn)()


def _rounds(contestants: Mapping[str, Contestant], wanted: int) -> int:
    """As many as wanted, fewer where a round, of which one is run here, takes long."""
    warm = measure.interleave(contestants, 1)
    seconds = sum(samples[0].wall * contestants[name].calls for name, samples in warm.items())
    return min(wanted, max(_FEWEST, int(_SECONDS / seconds)))


def _spread(samples: Sequence[Sample], clock: str) -> Spread:
    """Of the quiet samples, where there are any."""
    used = [s for s in samples if s.quiet] or samples
    return Spread.of([getattr(s, clock) for s in used])


def _judge(case: Case, dtype: str, ratio: Ratio, settings: Settings) -> Verdict:
    """Wall time of threads proves something on a quiet machine only; the CPU time of one thread always does."""
    median, target = getattr(ratio, settings.clock).median, case.least(ratio.over, dtype)
    judged = not settings.quick and (ratio.quiet or settings.clock == "cpu")
    return Verdict(ratio.over, median, target, median >= target if judged else None)


def _judge_share(case: Case, dtype: str, share: Share, settings: Settings, quiet: bool) -> Verdict:
    """The share of memory bandwidth has a target for decoding, that of the matrix rate for prefill."""
    kind = "memory" if case.few else "compute"
    if not case.judged or case.backward or share.bound != kind or share.floor < _SHORTEST:
        return Verdict("ceiling", share.share, None, None)
    target = _OF_CEILING[kind]
    limits = settings.ceilings
    quiet = quiet and limits.memory.quiet and limits.matrix[dtype].quiet
    judged = not settings.quick and (quiet or settings.clock == "cpu")
    return Verdict("ceiling", share.share, target, share.share >= target if judged else None)
