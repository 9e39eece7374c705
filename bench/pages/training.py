"""What the pages say about the cost of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.pages.results import MIB, Table, Tables, bracketed, goal, records

COST = "train-cost-cpu.jsonl"


def times() -> Table:
    """Steps of one prompt and of many, by the latest run of each case."""
    return [["case", "ratio of times", "", "pairs", "target"], *_times()]


def memory() -> Table:
    """The peak of a step above rest: the median of the processes, and what it is of the bare backbone's."""
    ratios = {r["over"]: r for r in records(COST, kind="memory ratio")}
    rows = []
    for r in records(COST, kind="memory"):
        peak, ratio = sorted(r["bytes"])[len(r["bytes"]) // 2] / MIB, ratios.get(r["name"])
        beside = ["", ""] if ratio is None else [f"{ratio['ratio']:.3f}", _goal(ratio)]
        rows.append([r["name"], f"{peak:,.0f} MiB", *beside])
    return [["", "peak above rest", "of the bare backbone's", "target"], *rows]


def _times() -> Iterator[list[str]]:
    latest = {(r["case"], r["over"], r["under"]): r for r in records(COST, kind="ratio")}
    for (case, over, under), r in latest.items():
        busy = "" if r["quiet"] else " (busy)"
        yield [case, f"{over} / {under}", bracketed(r["wall"]), f"{r['wall']['count']}{busy}", _goal(r)]


def _goal(r: dict[str, Any]) -> str:
    return f"{goal(r['target'])}: {'met' if r['met'] else 'MISSED'}" if r["target"] else ""


TABLES: Tables = {"train-cost.times": times, "train-cost.memory": memory}
