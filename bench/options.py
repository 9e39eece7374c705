"""Options that several benchmarks have, each said once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_OPTIONS: dict[str, dict[str, Any]] = {
    "quick": {"action": "store_true", "help": "tiny sizes: shows that it runs, judges nothing"},
    "rounds": {"type": int, "help": "rounds of each interleaved run"},
    "threads": {"type": int, "default": 2, "help": "threads of torch (default: 2)"},
    "wait": {"type": float, "default": 0.0, "help": "seconds to wait for a quiet machine before each case"},
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
