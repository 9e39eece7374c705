"""Pictures of a run, where matplotlib is installed: times of every case with its floor, and targets."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
_MODES = (("graph", "cold"), ("eager", "cold"))  # the first that was timed
_OURS, _OTHERS, _MISSED = "#1f77b4", "#b0b0b0", "#d62728"


def draw(lines: Sequence[Line], stem: Path) -> list[Path]:
    """Writes `STEM-times.svg` and `STEM-targets.svg`; nothing where there is no matplotlib or nothing to show."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    drawn = []
    for name, fill in (("times", _times), ("targets", _targets)):
        figure = Figure(layout="constrained")
        if fill(figure, lines):
            path = stem.with_name(f"{stem.name}-{name}.svg")
            figure.savefig(path)
            drawn.append(path)
    return drawn


def _times(figure: Any, lines: Sequence[Line]) -> bool:
    cases = list(dict.fromkeys(line["unit"] for line in lines if line["kind"] == "time" and line["part"] == "micro"))
    if not cases:
        return False
    figure.set_size_inches(9, 3 * len(cases))
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        found = [line for line in lines if line["kind"] == "time" and line["unit"] == case and line["part"] == "micro"]
        mode = next((m for m in _MODES if any((x["launch"], x["buffers"]) == m for x in found)), _MODES[0])
        found = [x for x in found if (x["launch"], x["buffers"]) == mode][::-1]
        middle = [1e6 * x["seconds"]["median"] for x in found]
        ends = [
            [abs(1e6 * x["seconds"][key] - m) for x, m in zip(found, middle, strict=True)] for key in ("p20", "p80")
        ]
        colors = [_OURS if x["name"].startswith("ours") else _OTHERS for x in found]
        axes.barh([x["name"] for x in found], middle, xerr=ends, color=colors)
        for line in lines:
            if line["kind"] == "floor" and line["unit"] == case:
                axes.axvline(1e6 * line["seconds"], color="black", linestyle=":", label="floor")
        axes.set_title(f"{case}, {mode[0]}, {mode[1]}", fontsize=9)
        axes.set_xlabel("microseconds a call: median, p20 and p80", fontsize=8)
    return True


def _targets(figure: Any, lines: Sequence[Line]) -> bool:
    found = [line for line in lines if line["kind"] == "verdict" and line["value"] is not None][::-1]
    if not found:
        return False
    figure.set_size_inches(9, 1 + 0.5 * len(found))
    axes = figure.subplots()
    shares = [line["value"] / line["least"] for line in found]
    colors = [_MISSED if line["met"] is False else _OURS for line in found]
    axes.barh([f"{line['unit']}\n{line['target']}" for line in found], shares, color=colors)
    axes.axvline(1.0, color="black", linestyle=":")
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("measured / target", fontsize=8)
    return True
