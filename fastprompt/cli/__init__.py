"""The `fastprompt` command: one file a command, all of them thin over the library."""

from __future__ import annotations

from typing import Annotated

import typer

import fastprompt
from fastprompt.cli.bench import PASSED_ON, bench
from fastprompt.cli.convert import export, import_
from fastprompt.cli.demo import demo
from fastprompt.cli.generate import generate
from fastprompt.cli.info import info
from fastprompt.cli.inspect import inspect
from fastprompt.cli.output import Commands
from fastprompt.cli.plan_capacity import plan_capacity
from fastprompt.cli.serve import serve
from fastprompt.cli.sweep import sweep
from fastprompt.cli.train import train

app = typer.Typer(
    name="fastprompt",
    cls=Commands,
    help="Soft prompts over one frozen transformer: any mixture of them in a batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(fastprompt.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


app.command("demo")(demo)
app.command("info")(info)
app.command("import")(import_)
app.command("export")(export)
app.command("inspect")(inspect)
app.command("generate")(generate)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("serve")(serve)
app.command("plan-capacity")(plan_capacity)
app.command("bench", context_settings=PASSED_ON)(bench)
