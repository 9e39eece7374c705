"""Results of a long benchmark, kept as they come: what is in the file already is not computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import runs
from bench.measure import SCHEMA


@dataclass(frozen=True)
class Score:
    """What one way of learning reached on one task with one seed.

    `validation` is its best score there, `test` the score on the test examples of what scored so; `curve` has
    [step, validation, test] of every evaluation. Shares between 0 and 1. `seconds` is the training of everything that
    was trained together.
    """

    validation: float
    test: float
    metric: str
    parameters: int
    seconds: float
    curve: list[list[float]] = field(default_factory=list)
    remark: str = ""


@dataclass(frozen=True)
class Result:
    """A score with what it belongs to: part of the benchmark, way, task, seed and settings."""

    part: str
    way: str
    task: str
    seed: int
    settings: dict[str, Any]
    score: Score

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": "score", **asdict(self)}

    @staticmethod
    def from_json(line: dict[str, Any]) -> Result:
        values = {k: v for k, v in line.items() if k not in ("schema", "kind", "score")}
        return Result(**values, score=Score(**line["score"]))


@dataclass(frozen=True)
class Unit:
    """One piece of work: it gives a score for every way and task of `gives` at once."""

    part: str
    gives: tuple[tuple[str, str], ...]  # (way, task)
    seed: int
    settings: dict[str, Any]
    work: Callable[[], dict[tuple[str, str], Score]]

    @property
    def ways(self) -> list[str]:
        """Its ways, each once."""
        return list(dict.fromkeys(way for way, _ in self.gives))


class Ledger:
    """The results in a file of JSON lines, or in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.results = [] if path is None else [Result.from_json(line) for line in _scores(path)]

    def note(self, kind: str, **values: Any) -> None:
        """Append a line about the run."""
        self._append({"schema": SCHEMA, "kind": kind, **values})

    def of(self, unit: Unit) -> list[Result]:
        """What is known of a unit with these very settings; the latest counts."""
        settings = json.loads(json.dumps(unit.settings))
        found = {
            (r.way, r.task): r for r in self.results if (r.part, r.seed, r.settings) == (unit.part, unit.seed, settings)
        }
        return [found[key] for key in unit.gives if key in found]

    def complete(self, unit: Unit) -> list[Result]:
        """The unit's results; it is worked on only if some are missing, and then written at once."""
        known = self.of(unit)
        if {(r.way, r.task) for r in known} != set(unit.gives):
            settings = json.loads(json.dumps(unit.settings))
            known = [
                Result(unit.part, way, task, unit.seed, settings, score) for (way, task), score in unit.work().items()
            ]
            for result in known:
                self._append(result.to_json())
            self.results += known
        return known

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _scores(path: Path) -> Iterator[dict[str, Any]]:
    """Lines with scores."""
    known = runs.lines(path) if path.is_file() else ()
    return (line for line in known if line.get("kind") == "score" and line.get("schema") == SCHEMA)
