"""What the pages say about ops beside each other, the whole model in short, the quickstart, and how costs grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.laws import exponent
from bench.op_run import OURS
from bench.pages.results import Table, Tables, Values, bracketed, over, record, records

MICRO = "micro-cpu.jsonl"
E2E = "e2e-cpu.jsonl"
SWEEP = "sweep-cpu.jsonl"
QUICKSTART = "quickstart-cpu.jsonl"
_OPS = ("paged_prefix_attention", "embed_prompts", "merge_states", "grouped_linear")
_TOGETHER = "single pass"
_WORTH = 8  # kWorth of csrc/cpu/schedule.h


def op(name: str) -> Callable[[], Table]:
    """Every case of an op: our time, its share of the ceiling, and each baseline's time over ours."""

    def found() -> Table:
        cases = records(MICRO, kind="case", op=name)
        baselines = sorted({n: None for case in cases for n in case["about"] if n != OURS}, key="reference".__eq__)
        rows = []
        for case in cases:
            ratios = {r["over"]: _ratio(r) for r in case["ratios"]}
            time, share = case["times"][OURS]["wall"]["median"], case["share"]
            rows.append([case["case"], case["dtype"], f"{1e6 * time:,.0f}", f"{share['share']:.0%}",
                         *(ratios.get(baseline, "") for baseline in baselines)])  # fmt: skip
        return [["case", "dtype", "us", "of the ceiling", *baselines], *rows]

    return found


def lost() -> Table:
    """Where a contestant of `micro` was faster than we are."""
    rows = [
        [case["op"], case["case"], case["dtype"], f"`{r['over']}`", _ratio(r)]
        for case in records(MICRO, kind="case")
        for r in case["ratios"]
        if r["wall"]["median"] < 1
    ]
    return [["op", "case", "dtype", "faster is", "its time over ours"], *rows]


def e2e() -> Table:
    """The whole model's ratios."""
    rows = [[r["case"], f"{r['over']} / {r['under']}", f"{bracketed(r['wall'], '.2f')}{_busy(r)}"]
            for r in records(E2E, kind="ratio")]  # fmt: skip
    return [["case", "ratio of times", ""], *rows]


def laws() -> Table:
    """Exponents of times and of memory, at the large end."""
    names = dict.fromkeys(fit["law"] for fit in records(SWEEP, kind="fit"))
    rows = []
    for law in names:
        times = [_exponent(law, name, "seconds", "large") for name in (OURS, "expanded", "folded")]
        held = _exponent(law, OURS, "bytes", "large") or _exponent(law, "bank", "bytes", "large")
        rows.append([law, _extent(law), _exponent(law, OURS, "seconds", "all"), *times,
                     held, _exponent(law, "expanded", "bytes", "large")])  # fmt: skip
    return [["what grows", "large end", "ours, all of it", "ours", "expanded", "folded", "memory, ours",
             "memory, expanded"], *rows]  # fmt: skip


def region(baseline: str, pick: Callable[[list[float]], float], **which: Any) -> Callable[[], str]:
    """One of the region's ratios baseline / ours at the points that `_points` gives."""
    return lambda: f"{pick([over(point, baseline) for point in _points(**which)]):.2f}"


def region_lost() -> str:
    """At how many points of those read together reading alone is quicker by more than the spread."""
    found = [next(r for r in point["ratios"] if r["over"] == _TOGETHER) for point in _points(together=True)]
    return f"{sum(ratio['wall']['p80'] < 1 for ratio in found)} of {len(found)}"


def _points(together: bool | None = None, least: int = 0) -> list[dict[str, Any]]:
    """Points of the region from so many virtual tokens on; those where rows read `together`, or those where not."""
    points = [p for p in records(SWEEP, law="region") if p["x"] >= least]
    return [p for p in points if together is None or together == (p["x"] * (p["y"] - 1) >= _WORTH * p["y"])]


def _ratio(ratio: dict[str, Any]) -> str:
    return f"{ratio['wall']['median']:.2f}{_busy(ratio)}"


def _busy(ratio: dict[str, Any]) -> str:
    return "" if ratio["quiet"] else " (busy)"


def _fit(law: str, name: str, quantity: str, part: str) -> dict[str, Any] | None:
    found = records(SWEEP, kind="fit", law=law, name=name, quantity=quantity, part=part)
    return record(SWEEP, kind="fit", law=law, name=name, quantity=quantity, part=part) if found else None


def _exponent(law: str, name: str, quantity: str, part: str) -> str:
    fit = _fit(law, name, quantity, part)
    return "" if fit is None else f"{exponent(fit['exponent'])} ± {fit['error']:.2f}"


def _extent(law: str) -> str:
    fit = _fit(law, OURS, "seconds", "large")
    assert fit is not None
    return f"{fit['first']:g} to {fit['last']:g}"


TABLES: Tables = {
    **{f"micro.{name}": op(name) for name in _OPS},
    "micro.lost": lost,
    "e2e": e2e,
    "sweep.laws": laws,
}
VALUES: Values = {
    "region.noise.low": region(_TOGETHER, min, together=False),
    "region.noise.high": region(_TOGETHER, max, together=False),
    "region.grouped.low": region(_TOGETHER, min, together=True),
    "region.best": region(_TOGETHER, max, together=True),
    "region.long": region(_TOGETHER, min, together=True, least=256),
    "region.folded": region("folded", min),
    "region.lost": region_lost,
    "quickstart": lambda: f"{record(QUICKSTART, kind='quickstart')['total']:.0f}",
}
