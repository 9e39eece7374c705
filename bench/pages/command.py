"""`python -m bench pages`: whether tables and numbers in README and docs/ are those of bench/results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from bench.checkout import ROOT
from bench.pages import costs, kernels, quality, serving, speed, training, vllm
from bench.pages.results import Table

TABLES = {
    **speed.TABLES, **costs.TABLES, **training.TABLES, **serving.TABLES, **vllm.TABLES, **quality.TABLES,
    **kernels.TABLES,
}  # fmt: skip
VALUES = {**speed.VALUES, **costs.VALUES, **serving.VALUES, **quality.VALUES}

_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)  # what stands there shows a mark and is none
_TABLE = re.compile(r"(<!-- results: (\S+) -->\n\n)((?:\|.*\n)*)")
_VALUE = re.compile(r"(<!-- result: (\S+) -->)(.*?)(?=<!-- -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--write", action="store_true", help="put the results' numbers in place of the pages'")


def run(args: argparse.Namespace) -> int:
    """1 where a page says something else than the results, unless it was put right."""
    stale = {page: found for page in pages() if (found := differences(page.read_text(encoding="utf-8")))}
    for page, found in stale.items():
        for name, held, want in found:
            print(f"{page.relative_to(ROOT)}: {name}\n  page:    {held}\n  results: {want}")
        if args.write:
            page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(stale)} pages {'written' if args.write else 'differ from bench/results'}")
    return int(bool(stale) and not args.write)


def pages() -> list[Path]:
    """README and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def marks(text: str) -> set[str]:
    """Names of all tables and values that a page has from results."""
    return {found[2] for pattern in (_TABLE, _VALUE) for found in pattern.finditer(_FENCE.sub("", text))}


def differences(text: str) -> list[tuple[str, str, str]]:
    """Name, what the page says and what the results say, where that is not the same."""
    found = []

    def compare(mark: re.Match[str], want: str) -> str:
        if mark[3] != want:
            found.append((mark[2], mark[3], want))
        return mark[0]

    _replace(text, compare)
    return found


def written(text: str) -> str:
    """The page with what the results say."""
    return _replace(text, lambda mark, want: mark[1] + want)


def markdown(table: Table) -> str:
    """A table as a page has it."""
    head, *rows = table
    shown = [head, ["---"] * len(head), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in shown]
    lines[1] = "|" + "---|" * len(head)
    return "".join(line + "\n" for line in lines)


def _replace(text: str, put: Callable[[re.Match[str], str], str]) -> str:
    parts = _FENCE.split(text)
    for i in range(0, len(parts), 2):
        part = _TABLE.sub(lambda mark: put(mark, markdown(TABLES[mark[2]]())), parts[i])
        parts[i] = _VALUE.sub(lambda mark: put(mark, VALUES[mark[2]]()), part)
    return "".join(parts)
