"""Timing on a machine that others may use too: interleaved runs, paired ratios, checks before any ratio.

Wall time counts. Every sample also records process CPU time and how many cores other processes used meanwhile; pairs
with a busy side are left out of a ratio while a quiet pair exists. A ratio of busy pairs is shown and proves nothing:
one preempted thread holds up all others. CPU time is reported beside wall time. With one thread it hardly feels other
processes; with more it includes the spinning of threads that wait, and misses time in which one thread runs alone.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

SCHEMA = 1  # of the JSON lines; raised when a field changes its meaning
BUSY = 0.1  # cores used by other processes above which a sample is not quiet
_PACKAGES = ("fastprompt", "torch", "transformers", "peft")
_WORK = (0, 2, 5, 6, 7)  # fields of /proc/stat that are work: not idle, not iowait, not nice, which gives way
_WATCH = 2.0  # seconds without other processes that make a machine quiet


class CheckFailed(Exception):
    """Contestants that must agree do not: no ratio may be shown."""


@dataclass(frozen=True)
class Sample:
    """One timed run: seconds of wall and process CPU time, and cores other processes used meanwhile."""

    round: int
    wall: float
    cpu: float
    others: float

    @property
    def quiet(self) -> bool:
        return self.others <= BUSY


@dataclass(frozen=True)
class Contestant:
    """What is timed: `run` is, `check` gets its result and is not; in every `every`-th round only."""

    run: Callable[[], torch.Tensor]
    check: Callable[[torch.Tensor], None]
    every: int = 1


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


def interleave(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, list[Sample]]:
    """Time every contestant once a round, in an order that turns round every time.

    Each result goes through its contestant's check, outside the timing.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for turn in range(rounds):
        names = [name for name, c in contestants.items() if turn % c.every == 0]
        for name in names if turn % 2 == 0 else reversed(names):
            sample, result = _timed(contestants[name].run, turn)
            contestants[name].check(result)
            samples[name].append(sample)
    return samples


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


def machine() -> dict[str, Any]:
    """What a reader must know about where the numbers come from."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "load": load(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


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


def _timed(run: Callable[[], torch.Tensor], turn: int) -> tuple[Sample, torch.Tensor]:
    system, cpu, wall = _system_cpu(), time.process_time(), time.perf_counter()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    others = max(_system_cpu() - system - cpu, 0.0) / wall
    return Sample(turn, wall, cpu, others), result


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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this file is at, with "+" where the tree differs from it; None outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
