"""`fastprompt bench`: the benchmarks of a checkout, as `python -m bench` runs them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import typer

from fastprompt.errors import FastPromptError

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}  # the command's own


def bench(context: typer.Context) -> None:
    """Run a benchmark of a checkout; `fastprompt bench --help` names them."""
    status = _commands().main(context.args)
    raise typer.Exit(status)


def _commands() -> ModuleType:
    """`bench.__main__` of the checkout that this package or the working directory is in."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "__main__.py").is_file() and (root / "fastprompt" / "__init__.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module("bench.__main__")
    raise FastPromptError(
        f"fastprompt bench: there is no bench folder beside {Path(__file__).resolve().parents[1]} or in {Path.cwd()}, "
        "expected a checkout of the repository, since packages leave it out; clone it and run the command there"
    )
