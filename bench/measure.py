"""Timing on a machine that others may use too: interleaved runs, paired ratios, checks before any ratio.

Wall time counts. Every sample also records process CPU time, how many cores other processes used around it, and how
long its threads waited for a core. Pairs with a busy side are left out of a ratio while a quiet pair exists. A ratio of
busy pairs is shown and proves nothing: one preempted thread holds up all others. CPU time is reported beside wall time.
With one thread it hardly feels other processes; with more it includes the spinning of threads that wait, and misses
time in which one thread runs alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch

SCHEMA = 1  # of the JSON lines; raised when a field changes its meaning
BUSY = 0.1  # cores used by other processes above which a sample is not quiet
_NEAR = 3.0  # times the quickest call beyond which a run is not looked at again
WAITED = 0.05  # seconds a second that threads were ready and not run above which a sample is not quiet
_NICE = (1,) if os.nice(0) > 0 else ()  # nice work gives way, unless to us who are nice too
_WORK = (0, 2, 5, 6, 7, *_NICE)  # fields of /proc/stat that are work: not idle, not iowait
_WATCH = 2.0  # seconds without other processes that make a machine quiet
_LOOK = 0.5  # seconds over which other processes' cores are counted: the system counts in hundredths of a second


class CheckFailed(Exception):
    """Contestants that must agree do not: no ratio may be shown."""


@dataclass(frozen=True)
class Sample:
    """One timed run: seconds of wall and process CPU time a call, and what disturbed it.

    `others`: cores other processes used around it. `waited`: seconds its threads waited for a core, a second.
    """

    round: int
    wall: float
    cpu: float
    others: float
    waited: float = 0.0

    @property
    def quiet(self) -> bool:
        return self.others <= BUSY and self.waited <= WAITED


@dataclass(frozen=True)
class Contestant:
    """What is timed: `run` is, `check` gets its result and is not; in every `every`-th round only.

    A run too short to time is called `calls` times in a row; the last result is checked.
    """

    run: Callable[[], Any]
    check: Callable[[Any], None]
    every: int = 1
    calls: int = 1


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile, and the smallest of `count` values."""

    median: float
    p20: float
    p80: float
    low: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("values is empty, expected at least one measurement")
        ordered = sorted(values)
        return Spread(
            statistics.median(ordered), _quantile(ordered, 0.2), _quantile(ordered, 0.8), ordered[0], len(ordered)
        )


@dataclass(frozen=True)
class Ratio:
    """`over / under` in wall and CPU time, pair by pair of one round; `quiet` when only quiet pairs were taken."""

    over: str
    under: str
    wall: Spread
    cpu: Spread
    quiet: bool


@dataclass
class Agreement:
    """Results that must be equal: the first one is kept, every further one is compared to it.

    The error is the largest absolute difference relative to the largest absolute value; 0 demands equality.
    """

    what: str
    tolerance: float = 0.0
    compared: int = 0
    worst: float = 0.0
    _kept: torch.Tensor | None = field(default=None, repr=False)

    def check(self, result: torch.Tensor) -> None:
        """Raise `CheckFailed` unless `result` agrees with the first one."""
        if self._kept is None:
            self._kept = result.clone()
        else:
            self.equal(result, self._kept)

    def equal(self, result: torch.Tensor, expected: torch.Tensor) -> None:
        """Raise `CheckFailed` unless the two agree."""
        if result.shape != expected.shape:
            raise CheckFailed(f"{self.what}: shape {list(result.shape)}, expected {list(expected.shape)}")
        scale = expected.double().abs().max().clamp(min=1e-300)
        error = ((result.double() - expected.double()).abs().max() / scale).item()
        self.compared += 1
        self.worst = max(self.worst, error)
        if not error <= self.tolerance:  # NaN fails too
            raise CheckFailed(f"{self.what}: relative error {error:.2e}, at most {self.tolerance:.0e} allowed")

    def finish(self) -> None:
        """Raise `CheckFailed` unless something was compared."""
        if not self.compared:
            raise CheckFailed(f"{self.what}: nothing was compared")


def interleave(contestants: Mapping[str, Contestant], rounds: int, *, crowded: bool = False) -> dict[str, list[Sample]]:
    """Time every contestant once a round, in an order that turns round every time.

    Each result goes through its contestant's check, outside the timing. `crowded`: they have more threads than the
    machine has cores, which wait for each other; only what other processes used tells then whether it was quiet.
    """
    runs: list[tuple[str, int, _Time]] = []
    marks = [_mark()]
    for turn in range(rounds):
        names = [name for name, c in contestants.items() if turn % c.every == 0]
        for name in names if turn % 2 == 0 else reversed(names):
            taken, result = _timed(contestants[name].run, contestants[name].calls)
            contestants[name].check(result)
            runs.append((name, turn, taken))
            marks.append(_mark())
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for (name, turn, taken), others in zip(runs, _others(marks), strict=True):
        waited = 0.0 if crowded else taken.waited
        samples[name].append(Sample(turn, taken.wall, taken.cpu, others, waited))
    return samples


def calls_for(run: Callable[[], Any], seconds: float) -> int:
    """How many calls of `run` in a row last at least about `seconds`; calls it."""
    run()
    return max(1, math.ceil(seconds / min(_timed(run, 1)[0].wall for _ in range(2))))


def ranking(runs: Mapping[str, Callable[[], Any]], clock: str, seconds: float) -> list[str]:
    """The names of `runs`, quickest first, by a short look on `clock`, "wall" or "cpu"."""
    for run in runs.values():
        run()
    once = {name: _timed(run, 1)[0].wall for name, run in runs.items()}
    near = [name for name in runs if once[name] <= _NEAR * min(once.values())]
    short = {name: Contestant(runs[name], _accept, calls=max(1, math.ceil(seconds / once[name]))) for name in near}
    samples = interleave(short, 5)
    looked = {name: Spread.of([getattr(s, clock) for s in samples[name]]).median for name in near}
    far = [name for name in runs if name not in looked]
    return [*sorted(near, key=looked.__getitem__), *sorted(far, key=once.__getitem__)]


def ratio(samples: Mapping[str, Sequence[Sample]], over: str, under: str) -> Ratio:
    """`over` in units of `under`, from the rounds in which both ran."""
    by_round = {s.round: s for s in samples[under]}
    pairs = [(s, by_round[s.round]) for s in samples[over] if s.round in by_round]
    quiet = [pair for pair in pairs if pair[0].quiet and pair[1].quiet]
    used = quiet or pairs
    wall, cpu = ([getattr(a, clock) / getattr(b, clock) for a, b in used] for clock in ("wall", "cpu"))
    return Ratio(over, under, Spread.of(wall), Spread.of(cpu), bool(quiet))


def wait_until_quiet(seconds: float) -> bool:
    """Wait up to `seconds` for other processes to pause; whether they did."""
    end = time.monotonic() + seconds
    while time.monotonic() + _WATCH < end:
        before = _system_cpu()
        time.sleep(_WATCH)
        if (_system_cpu() - before) / _WATCH <= BUSY:
            return True
    return False


class Journal:
    """JSON lines, each with the schema's version and its kind; None writes nowhere."""

    def __init__(self, out: TextIO | None) -> None:
        self._out = out

    def write(self, kind: str, **values: Any) -> None:
        if self._out is not None:
            self._out.write(json.dumps({"schema": SCHEMA, "kind": kind} | values) + "\n")
            self._out.flush()

    def samples(self, case: str, samples: Mapping[str, Sequence[Sample]]) -> None:
        """Every sample of a case, and what they come to."""
        for name, runs in samples.items():
            for run in runs:
                self.write("sample", case=case, name=name, **asdict(run))
            wall, cpu = ([getattr(run, clock) for run in runs] for clock in ("wall", "cpu"))
            self.write("time", case=case, name=name, wall=asdict(Spread.of(wall)), cpu=asdict(Spread.of(cpu)))


def _accept(result: Any) -> None:
    """The check of what is checked elsewhere."""


@dataclass(frozen=True)
class _Time:
    """What one call took, in seconds, and `Sample.waited`."""

    wall: float
    cpu: float
    waited: float


def _timed(run: Callable[[], Any], calls: int) -> tuple[_Time, Any]:
    """The time of a call, of several in a row, and the last result."""
    waited, cpu, wall = _waited(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return _Time(wall / calls, cpu / calls, max(_waited() - waited, 0.0) / wall), result


def _waited() -> float:
    """Seconds threads of this process waited for a core so far; 0 where the system does not say."""
    try:
        waits = [(task / "schedstat").read_text().split()[1] for task in Path("/proc/self/task").iterdir()]
    except OSError:
        return 0.0
    return sum(map(int, waits)) / 1e9


def _mark() -> tuple[float, float]:
    """Now, and the CPU seconds other processes used so far."""
    return time.perf_counter(), _system_cpu() - time.process_time()


def _others(marks: Sequence[tuple[float, float]]) -> list[float]:
    """Cores other processes used around each run, one between every two marks; short runs share a look."""
    bounds = [0]
    for i, (now, _) in enumerate(marks):
        if now - marks[bounds[-1]][0] >= _LOOK:
            bounds.append(i)
    if len(bounds) > 1:
        bounds.pop()  # the last look takes in what is left
    bounds.append(len(marks) - 1)
    used: list[float] = []
    for first, last in pairwise(bounds):
        seconds, others = (b - a for a, b in zip(marks[first], marks[last], strict=True))
        used += [max(others, 0.0) / seconds] * (last - first)
    return used


def _system_cpu() -> float:
    """CPU seconds all processes of the machine used so far; of this one where the system does not say."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return time.process_time()
    return sum(ticks[i] for i in _WORK) / os.sysconf("SC_CLK_TCK")


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
