"""A picture of a sweep: score against trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt.errors import UnsupportedError
from fastprompt.training.sweep.seeds import over_seeds


def plot(results: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the results of a sweep, a panel a prompt, a colour a method; dropped candidates are hollow.

    Settings that were tried with several seeds have a bar: their mean, and one standard deviation to either side.

    Errors: UnsupportedError without matplotlib (`pip install 'fastprompt[plot]'`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "a plot needs matplotlib, which is not installed: pip install 'fastprompt[plot]'"
        ) from None
    scored = [result for result in results if result["best_score"] is not None]
    bases = list(dict.fromkeys(result["base"] for result in scored))
    methods = list(dict.fromkeys(result["method"] for result in scored))
    figure = Figure(figsize=(1 + 5 * max(1, len(bases)), 4), layout="constrained")
    panels = figure.subplots(1, max(1, len(bases)), squeeze=False)[0]
    for panel, base in zip(panels, bases, strict=False):
        mine = [result for result in scored if result["base"] == base]
        for number, method in enumerate(methods):
            chosen = [result for result in mine if result["method"] == method]
            _points(panel, chosen, f"C{number}", method)
            _bars(panel, over_seeds(chosen), f"C{number}")
        panel.set(title=base, xlabel="trained parameters", ylabel=mine[0]["metric"], xscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path)
    return Path(path)


def _points(panel: Any, results: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """One method's candidates: filled where they trained to the end."""
    for pruned in (False, True):
        chosen = [result for result in results if (result["stopped"] == "pruned") == pruned]
        if chosen:
            panel.scatter(
                [result["trained_parameters"] for result in chosen],
                [result["best_score"] for result in chosen],
                s=24,
                edgecolors=colour,
                facecolors="none" if pruned else colour,
                label=f"{label} (dropped)" if pruned else label,
            )


def _bars(panel: Any, settings: Sequence[Mapping[str, Any]], colour: str) -> None:
    """Mean and spread of settings that have several scores."""
    several = [setting for setting in settings if setting["spread"] is not None]
    if several:
        panel.errorbar(
            [setting["trained_parameters"] for setting in several],
            [setting["mean"] for setting in several],
            yerr=[setting["spread"] for setting in several],
            fmt="_",
            markersize=12,
            capsize=3,
            color=colour,
        )
