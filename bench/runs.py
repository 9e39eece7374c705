"""Runs that stand in files of results: reading them, and finding the last of its kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Line = dict[str, Any]


@dataclass
class Run:
    """One run: the file it stands in, its machine line, and the lines after that."""

    file: Path
    machine: Line
    lines: list[Line] = field(default_factory=list)

    @property
    def benchmark(self) -> str:
        return str(self.machine["benchmark"])

    @property
    def quick(self) -> bool:
        return bool(self.machine.get("quick", False))

    @property
    def clock(self) -> str:
        """The clock that counts: CPU time of one thread, wall time of more."""
        return "cpu" if self.machine["threads"] == 1 else "wall"

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two machines must share for their times to be compared."""
        return tuple(self.machine.get(name) for name in ("cpu", "cores", "threads", "capability", "device", "impl"))

    def of(self, kind: str) -> list[Line]:
        """Its lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def describe(self) -> str:
        here = self.machine
        return (
            f"{here['benchmark']} of {here['time']}, commit {here['commit']}, {here['cpu']}, {here['threads']} threads"
        )


def read(path: Path) -> list[Run]:
    """The runs of a file."""
    found: list[Run] = []
    for line in lines(path):
        if line.get("kind") == "machine":
            found.append(Run(path, line))
        elif found:
            found[-1].lines.append(line)
    return found


def in_folder(folder: Path = RESULTS) -> list[Run]:
    """All runs in the files of a folder, the latest last."""
    runs = [run for path in sorted(folder.glob("*.jsonl")) for run in read(path)]
    return sorted(runs, key=lambda run: str(run.machine["time"]))


def latest(runs: Iterable[Run], benchmark: str, kind: tuple[Any, ...] | None = None) -> Run | None:
    """The last run of a benchmark at full size, on machines of a kind or on any."""
    fit = [r for r in runs if r.benchmark == benchmark and not r.quick and kind in (None, r.kind)]
    return max(fit, key=lambda run: str(run.machine["time"]), default=None)


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file; one that a kill cut off is left out."""
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue
