"""Pictures of a `sweep`: the laws of time and of memory, and the map of where reading together pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench import laws
from bench.op_run import OURS
from bench.runs import Line, Run

COLORS = {OURS: "#1f77b4", "bank": "#1f77b4", "expanded": "#d62728", "folded": "#7f7f7f"}
_REGION = "region"
_COLUMNS = 4
_HEADROOM = 4.0  # times the largest value that an axis goes on, for the legend


def times(figure: Any, run: Run) -> None:
    """A panel a law: medians with their 20th and 80th percentile, and the exponent over the large end."""
    for axes, law in _panels(figure, [law for law in _laws(run) if law != _REGION]):
        points = [p for p in run.of("point") if p["law"] == law]
        for name in points[0]["times"]:
            spreads = [p["times"][name][run.clock] for p in points]
            _series(axes, run, law, name, "seconds", [p["x"] for p in points], [s["median"] for s in spreads], 1e3)
            axes.fill_between(
                [p["x"] for p in points], [1e3 * s["p20"] for s in spreads], [1e3 * s["p80"] for s in spreads],
                color=COLORS[name], alpha=0.2, linewidth=0,
            )  # fmt: skip
        _finish(axes, law, "milliseconds")


def memory(figure: Any, run: Run) -> None:
    """A panel a law: bytes that torch allocates in one call, and those of the bank."""
    for axes, law in _panels(figure, [law for law in _laws(run) if law != _REGION]):
        points = [p for p in run.of("point") if p["law"] == law]
        for name in points[0]["allocated"]:
            sizes = [p["allocated"][name] for p in points]
            _series(axes, run, law, name, "bytes", [p["x"] for p in points], sizes, 2**-20)
        _finish(axes, law, "MiB")


def region(figure: Any, run: Run) -> None:
    """Two maps over virtual tokens and rows a prompt: how many times as long each baseline takes."""
    points = [p for p in run.of("point") if p["law"] == _REGION]
    names = ("single pass", "folded")
    about = {"single pass": "every row reads its prompt alone / ours", "folded": "folded SDPA / ours"}
    figure.set_size_inches(9, 3.2)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        found = {(p["x"], p["y"]): ratio(p, name, run.clock) for p in points}
        _map(axes, found)
        axes.set_title(f"{about[name]} (red: ours loses)")


def ratio(point: Line, over: str, clock: str) -> float:
    """How many times as long as ours a baseline takes at a point."""
    return float(next(r[clock]["median"] for r in point["ratios"] if r["over"] == over))


def _laws(run: Run) -> list[str]:
    return list(dict.fromkeys(p["law"] for p in run.of("point")))


def _panels(figure: Any, names: Sequence[str]) -> list[tuple[Any, str]]:
    rows = math.ceil(len(names) / _COLUMNS)
    figure.set_size_inches(10, 2.4 * rows)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for unused in panels[len(names) :]:
        unused.set_visible(False)
    return list(zip(panels, names, strict=False))


def _series(
    axes: Any, run: Run, law: str, name: str, quantity: str, x: Sequence[float], y: Sequence[float], unit: float
) -> None:
    fits = [
        f for f in run.of("fit") if (f["law"], f["name"], f["quantity"], f["part"]) == (law, name, quantity, "large")
    ]
    grows = f": ~ x^{laws.exponent(fits[0]['exponent'])}" if fits else ""
    axes.plot(x, [unit * v for v in y], "o-", markersize=2.5, linewidth=1, color=COLORS[name],
              label=f"{name}{grows}")  # fmt: skip


def _finish(axes: Any, law: str, unit: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, _HEADROOM * high)
    axes.set_xlabel(law)
    axes.set_ylabel(unit)
    axes.legend(fontsize=7, loc="upper left", borderpad=0.1, labelspacing=0.1)


def _map(axes: Any, found: Mapping[tuple[float, float], float]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    across, up = sorted({x for x, _ in found}), sorted({y for _, y in found})
    logs = [[math.log2(found[x, y]) for x in across] for y in up]
    most = max(abs(v) for row in logs for v in row)
    axes.imshow(logs, cmap="RdBu", norm=TwoSlopeNorm(0, -most, most), origin="lower", aspect="auto")
    axes.grid(False)
    for j, y in enumerate(up):
        for i, x in enumerate(across):
            dark = abs(logs[j][i]) > 0.6 * most
            axes.text(i, j, f"{found[x, y]:.2f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(across)), [f"{x:g}" for x in across])
    axes.set_yticks(range(len(up)), [f"{y:g}" for y in up])
    axes.set_xlabel("virtual tokens")
    axes.set_ylabel("rows a prompt (of 32)")
