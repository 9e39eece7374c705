"""The lines of a run's file: their kinds, what each of them must say, and the states of a unit of work."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bench.measure import SCHEMA

GREEN, RED, ERROR, NOT_RUN, NOT_AVAILABLE = "green", "red", "error", "not run", "not available"
STATES = (GREEN, RED, ERROR, NOT_RUN, NOT_AVAILABLE)
FAILED = (RED, ERROR)
LOST = 3  # a worker's exit status: the device answers it no more
Emit = Callable[..., None]  # writes a line: its kind, and its fields by name


class NotAvailable(Exception):
    """This machine has no means for a unit."""


FIELDS: Mapping[str, frozenset[str]] = {  # kind -> what a line of it has at least, beside schema and kind
    "machine": frozenset({"benchmark", "quick", "device", "gpu", "versions", "commit", "minutes", "parts"}),
    "part": frozenset({"part", "state", "seconds", "units"}),
    "begin": frozenset({"part", "unit"}),
    "unit": frozenset({"part", "unit", "state", "seconds", "detail"}),
    "gpu": frozenset({"part", "unit", "name", "capability", "memory", "multiprocessors", "l2"}),
    "ceiling": frozenset({"part", "unit", "what", "rate", "how"}),
    "check": frozenset({"part", "unit", "who", "errors"}),
    "peer": frozenset({"part", "unit", "name", "state", "detail"}),
    "time": frozenset({"part", "unit", "name", "launch", "buffers", "seconds", "calls", "sets"}),
    "cost": frozenset({"part", "unit", "path", "shape", "work", "seconds"}),
    "table": frozenset({"part", "unit", "table"}),
    "floor": frozenset({"part", "unit", "flops", "bytes", "seconds", "bound"}),
    "ratio": frozenset({"part", "unit", "over", "under", "launch", "buffers", "ratio"}),
    "verdict": frozenset({"part", "unit", "target", "least", "value", "over", "met"}),
    "note": frozenset({"part", "unit", "text"}),
    "end": frozenset({"seconds", "status"}),
}


def together(states: Collection[str]) -> str:
    """The state of what units of these states make up."""
    return next((s for s in (ERROR, RED, NOT_RUN, GREEN) if s in states), NOT_AVAILABLE)


def problem(line: Mapping[str, Any]) -> str | None:
    """What is wrong with a line, or None."""
    kind = line.get("kind")
    if kind not in FIELDS:
        return f"kind is {kind!r}, expected one of {', '.join(FIELDS)}"
    if line.get("schema") != SCHEMA:
        return f"schema is {line.get('schema')!r}, expected {SCHEMA}"
    missing = sorted(FIELDS[kind] - line.keys())
    if missing:
        return f"a {kind} line lacks {', '.join(missing)}"
    if "state" in line and kind in ("unit", "part") and line["state"] not in STATES:
        return f"state is {line['state']!r}, expected one of {', '.join(STATES)}"
    return None


def parse(written: str) -> dict[str, Any]:
    """A line of a file; `ValueError` where it is none."""
    line: dict[str, Any] = json.loads(written)
    wrong = problem(line)
    if wrong:
        raise ValueError(wrong)
    return line


def text(line: Mapping[str, Any]) -> str:
    """A line as it is written."""
    wrong = problem(line)
    if wrong:
        raise ValueError(wrong)
    return json.dumps(line) + "\n"
