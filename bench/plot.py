"""`python -m bench plot`: the pictures of the documentation, from the last runs in bench/results.

A picture names the results it shows and their digest in its metadata, and is the same to the last bit wherever the same
matplotlib draws it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import law_pictures, roofline, runs
from bench.checkout import ROOT
from bench.runs import Run

FOLDER = ROOT / "docs" / "pictures"
PICTURES: Mapping[str, tuple[str, Callable[[Any, Run], None]]] = {  # file -> benchmark, and what draws a run of it
    "cost-laws.svg": ("sweep", law_pictures.times),
    "cost-laws-memory.svg": ("sweep", law_pictures.memory),
    "grouped-decode-region.svg": ("sweep", law_pictures.region),
    "roofline.svg": ("micro", roofline.draw),
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastprompt",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench plot`."""
    parser.add_argument("--results", type=Path, default=runs.RESULTS, help="folder of results (default: the committed)")
    parser.add_argument(
        "--to", type=Path, default=FOLDER, metavar="FOLDER", help="where to draw (default: docs/pictures)"
    )


def run(args: argparse.Namespace) -> int:
    """Draws every picture whose run is there; 1 where one is not, or where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("plot needs matplotlib: pip install 'fastprompt[plot]'", file=sys.stderr)
        return 1
    found = runs.in_folder(args.results)
    args.to.mkdir(parents=True, exist_ok=True)
    missing = 0
    for name, (benchmark, draw) in PICTURES.items():
        last = runs.latest(found, benchmark)
        if last is None:
            print(f"{name}: no run of {benchmark} in {args.results}", file=sys.stderr)
            missing += 1
            continue
        with matplotlib.rc_context(_STYLE):
            figure = Figure(layout="constrained")
            draw(figure, last)
            figure.savefig(args.to / name, metadata={"Date": None, "Creator": None, "Source": source(last)})
        print(f"drawn: {args.to / name}")
    return int(missing > 0)


def source(shown: Run) -> str:
    """A run's file and a digest of its lines: what a picture of it carries."""
    content = json.dumps([shown.machine, *shown.lines], sort_keys=True).encode()
    return f"{shown.file.name} {hashlib.sha256(content).hexdigest()[:16]}"
