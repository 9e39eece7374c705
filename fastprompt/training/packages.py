"""The packages of the extra `train`, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from fastprompt.errors import ArgumentError


def missing(what: str, packages: Iterable[str]) -> list[str]:
    """A sentence for each of the packages that `what` needs and that is not installed."""
    return [
        f"{what} needs {package}, which is not installed: pip install 'fastprompt[train]'"
        for package in packages
        if find_spec(package) is None
    ]


def need(what: str, *packages: str) -> None:
    """Raises ArgumentError unless all packages that `what` needs are installed."""
    if said := missing(what, packages):
        raise ArgumentError("; ".join(said))
