"""Options that several benchmarks have, each said once."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastprompt import dispatch

_OPTIONS: dict[str, dict[str, Any]] = {
    "impl": {"choices": dispatch.IMPLS, "help": "implementation to measure (default: the best here)"},
    "quick": {"action": "store_true", "help": "tiny sizes: shows that it runs, judges nothing"},
    "rounds": {"type": int, "metavar": "N", "help": "rounds of each interleaved run (default: by case)"},
    "threads": {"type": int, "default": 2, "metavar": "N", "help": "threads of torch (default: 2)"},
    "wait": {
        "type": float,
        "default": 0.0,
        "metavar": "SECONDS",
        "help": "of waiting for a quiet machine before a case",
    },
    "out": {"type": Path, "metavar": "FILE", "help": "append JSON lines to this file"},
}


def add(parser: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Gives a parser the options of these names, and those of `defaults` with another default."""
    for name, settings in _OPTIONS.items():
        if name in defaults:
            about = f"{settings['help'].partition(' (default')[0]} (default: {defaults[name]})"
            parser.add_argument(f"--{name}", **settings | {"default": defaults[name], "help": about})
        elif name in names:
            parser.add_argument(f"--{name}", **settings)


def choice(parser: argparse.ArgumentParser, flag: str, known: Collection[str], about: str) -> None:
    """Gives a parser an option that takes some of the names that are known, by default all."""
    shown = ", ".join(f'"{name}"' if " " in name else name for name in known)
    parser.add_argument(
        flag,
        nargs="+",
        choices=list(known),
        default=list(known),
        metavar="NAME",
        help=f"{about} (default: all): {shown}",
    )
