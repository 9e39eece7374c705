"""Lines of bench/results, and numbers as the pages write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any

from bench import runs
from bench.measure import Sample
from bench.measure import ratio as measured
from bench.runs import RESULTS

MIB = 2**20

Table = Sequence[Sequence[str]]  # the header, then rows
Tables = Mapping[str, Callable[[], Table]]
Values = Mapping[str, Callable[[], str]]


@cache
def lines(file: str) -> list[dict[str, Any]]:
    """Every line of a results file."""
    return list(runs.lines(RESULTS / file))


def records(file: str, **want: Any) -> list[dict[str, Any]]:
    """The lines of a file that hold these values."""
    return [line for line in lines(file) if all(line.get(key) == value for key, value in want.items())]


def record(file: str, **want: Any) -> dict[str, Any]:
    """The one line of a file that holds these values.

    Raises LookupError where there is none, or more than one: the page's number would say nothing about which.
    """
    found = records(file, **want)
    if len(found) != 1:
        raise LookupError(f"{file} has {len(found)} lines with {want}, expected one")
    return found[0]


def ratio(file: str, case: str, over: str, under: str, clock: str = "wall") -> dict[str, float]:
    """The spread of a ratio of times: median, p20, p80."""
    spread: dict[str, float] = record(file, kind="ratio", case=case, over=over, under=under)[clock]
    return spread


def paired(file: str, case: str, over: str, under: str) -> dict[str, float]:
    """The spread of a ratio of wall times that the run did not write down itself, from its samples, pair by pair."""
    samples: dict[str, list[Sample]] = {over: [], under: []}
    for line in records(file, kind="sample", case=case):
        if line["name"] in samples:
            samples[line["name"]].append(Sample(*(line[field.name] for field in fields(Sample))))
    return asdict(measured(samples, over, under).wall)


def over(case: Mapping[str, Any], baseline: str) -> float:
    """How many times as long as ours a baseline takes, of a case or point."""
    median: float = next(r["wall"]["median"] for r in case["ratios"] if r["over"] == baseline)
    return median


def bracketed(spread: Mapping[str, float], form: str = ".3f") -> str:
    """A median with its 20th and 80th percentile."""
    return f"{spread['median']:{form}} [{spread['p20']:{form}}, {spread['p80']:{form}}]"


def goal(target: str | None) -> str:
    """`>= 0.95x` as `at least 0.95`."""
    if target is None:
        return ""
    sign, number = target.split()
    return f"{'at least' if sign == '>=' else 'at most'} {float(number.removesuffix('x')):g}"
