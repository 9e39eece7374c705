"""The roofline picture of a `micro` run: a panel an op, under the ceilings that the same run measured."""

from __future__ import annotations

from typing import Any

from bench.runs import Line, Run

_COLORS = {"fp32": "#1f77b4", "bf16": "#ff7f0e", "fp16": "#2ca02c"}
_COPY = 0.02  # operations a byte at which what computes nothing is drawn
_EDGES = (0.01, 2000.0)
_MARKS = {"train": "s", "prefill": "^"}


def draw(figure: Any, run: Run) -> None:
    """Operations a second over operations a byte, each unique byte counted once."""
    (limits,) = run.of("ceilings")
    ops = list(dict.fromkeys(line["op"] for line in run.of("case")))
    figure.set_size_inches(10, 5)
    panels = figure.subplots(2, 3).flatten()
    for unused in panels[len(ops) :]:
        unused.set_visible(False)
    for axes, op in zip(panels, ops, strict=False):
        for dtype, ceiling in limits["matrix"].items():
            _roof(axes, limits["memory"]["rate"] / 1e9, ceiling["rate"] / 1e9, dtype)
        for line in (line for line in run.of("case") if line["op"] == op):
            x, y = place(line)
            mark = _MARKS.get(line["case"].split()[0], "o")
            axes.plot(x, y, mark, color=_COLORS[line["dtype"]], markersize=4, alpha=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_title(op if op != "embed_prompts" else f"{op} (copies, drawn at {_COPY:g})")
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("GFLOP/s")
    panels[0].legend(fontsize=6)


def place(line: Line) -> tuple[float, float]:
    """Operations a byte and GFLOP/s of our call."""
    share = line["share"]
    if share["gflops"]:
        return share["gflops"] / share["gbs"], share["gflops"]
    return _COPY, _COPY * share["gbs"]


def _roof(axes: Any, gbs: float, gflops: float, dtype: str) -> None:
    knee = gflops / gbs
    axes.plot(
        [_EDGES[0], knee, _EDGES[1]], [_EDGES[0] * gbs, gflops, gflops], color=_COLORS[dtype], linewidth=1,
        label=f"{dtype}: {gbs:.0f} GB/s, {gflops:.0f} GFLOP/s",
    )  # fmt: skip
