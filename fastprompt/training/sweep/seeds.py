"""Settings of a sweep that were tried with several seeds: their mean score, and how far the seeds lie apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

SEED = "seed"


def over_seeds(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for all candidates of a prompt that differ in the seed only, in JSON types; none if no seed is swept.

    Semantics: `mean` is that of the best scores, `spread` their sample standard deviation (None for a single one);
    a candidate without a score counts in neither, one that was dropped early with what it had reached (`pruned` says
    how many). `candidates` and `seeds` name them.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        if SEED in result["values"]:
            key = result["base"], json.dumps(_setting(result), sort_keys=True)
            groups.setdefault(key, []).append(result)
    return [_line(group) for group in groups.values()]


def _setting(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result["values"].items() if key != SEED}


def _line(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = group[0]
    scores = [result["best_score"] for result in group if result["best_score"] is not None]
    return {
        "base": first["base"],
        "values": _setting(first),
        "method": first["method"],
        "metric": first["metric"],
        "trained_parameters": first["trained_parameters"],
        "candidates": [result["name"] for result in group],
        "seeds": [result["values"][SEED] for result in group],
        "scored": len(scores),
        "pruned": sum(result["stopped"] == "pruned" for result in group),
        "mean": fmean(scores) if scores else None,
        "spread": stdev(scores) if len(scores) > 1 else None,
    }
