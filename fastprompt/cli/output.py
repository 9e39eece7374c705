"""What all commands share: the consoles, `--json`, and errors as one red line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fastprompt.errors import FastPromptError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Commands(TyperGroup):
    """A group whose deliberate errors end the process with status 1 and a line a problem instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FastPromptError as error:
            for problem in getattr(error, "problems", None) or [str(error)]:
                errors.print(f"error: {' '.join(problem.split())}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None


def emit(data: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    """Print `data` as JSON, or for people with `render`."""
    if as_json:
        print(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        render(data)


def fields(values: Mapping[str, Any], title: str | None = None) -> None:
    """Print name-value pairs, one a line; None and empty values are left out."""
    table = Table(box=None, show_header=False, title=title and Text(title), title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value not in (None, "", [], {}, ()):
            table.add_row(Text(name), Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    console.print(table)
