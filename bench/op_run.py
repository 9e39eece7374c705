"""Timing contestants of one op on one shape: how, what came of it, and what all ops share in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, Protocol

from bench import machine, measure
from bench.ceilings import Ceilings, Share
from bench.measure import Contestant, Ratio, Sample, Spread

OURS = "ours"
SLACK = 4.0  # bounds a baseline may be off by: it must compute the same thing, how exactly is its own affair
_SECONDS = 6.0  # of one interleaved run; slow contestants get fewer rounds
_FEWEST = 5  # rounds all the same
_MOST_SETS = {False: 512, True: 2}  # of inputs that take turns; when quick
SAMPLE = {False: 5e-3, True: 2e-4}  # seconds of calls that make one sample; when quick


class Named(Protocol):
    """A shape of an op."""

    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Settings:
    """How to measure: `clock` is "wall" or "cpu"; what is `quick` judges nothing and is lenient about errors.

    `rotate`: whether inputs take turns, None as the case says. `baselines`: who else takes part, None for the usual.
    """

    impl: str
    clock: str
    ceilings: Ceilings
    rounds: int
    rotate: bool | None
    quick: bool
    baselines: tuple[str, ...] | None = None

    def wants(self, baseline: str, usual: bool = True) -> bool:
        """Whether a baseline takes part; those that are not `usual` only where they are asked for."""
        return usual if self.baselines is None else baseline in self.baselines


@dataclass(frozen=True)
class Verdict:
    """A number and the least it should be; `met` is None where it was not judged."""

    over: str
    value: float
    target: float | None
    met: bool | None


@dataclass(frozen=True)
class OpOutcome:
    """A case that was green: what it took, how far off it was, and how it compares."""

    case: Named
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


def timed(
    turns: Mapping[str, Sequence[Callable[[], Any]]], settings: Settings
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """The samples of every contestant, each of which goes through its calls in turn, and the last result of each."""
    last: dict[str, Any] = {}
    contestants = {}
    for name, runs in turns.items():
        turn = in_turn(runs)
        calls = measure.calls_for(turn, SAMPLE[settings.quick])
        contestants[name] = Contestant(turn, partial(last.__setitem__, name), calls=calls)
    return measure.interleave(contestants, _rounds(contestants, settings.rounds)), last


def in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One callable that calls the next of several each time."""
    if len(runs) == 1:
        return runs[0]
    turn = cycle(runs)
    return lambda: next(turn)()


def set_count(size: float, rotate: bool, quick: bool) -> int:
    """Sets of inputs of a size that together are twice what the caches hold; one where they shall stay hot."""
    return min(_MOST_SETS[quick], 1 + math.ceil(2 * machine.last_level_cache() / size)) if rotate else 1


def spread(samples: Sequence[Sample], clock: str) -> Spread:
    """Of the quiet samples, where there are any."""
    used = [s for s in samples if s.quiet] or samples
    return Spread.of([getattr(s, clock) for s in used])


def judge(ratio: Ratio, target: float, settings: Settings) -> Verdict:
    """Wall time of threads proves something on a quiet machine only; the CPU time of one thread always does."""
    median = getattr(ratio, settings.clock).median
    judged = not settings.quick and (ratio.quiet or settings.clock == "cpu")
    return Verdict(ratio.over, median, target, median >= target if judged else None)


def slack(name: str, settings: Settings) -> float:
    """Bounds a contestant may be off by."""
    return 1.0 if name in (OURS, "reference") and not settings.quick else SLACK


def _rounds(contestants: Mapping[str, Contestant], wanted: int) -> int:
    """As many as wanted, fewer where a round, of which one is run here, takes long."""
    warm = measure.interleave(contestants, 1)
    seconds = sum(samples[0].wall * contestants[name].calls for name, samples in warm.items())
    return min(wanted, max(_FEWEST, int(_SECONDS / seconds)))
