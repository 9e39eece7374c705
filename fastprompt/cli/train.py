"""`fastprompt train`: every prompt of a config file, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fastprompt.cli.live import live_table, number
from fastprompt.cli.output import Json, console, emit
from fastprompt.errors import ArgumentError

if TYPE_CHECKING:
    from fastprompt.training.job import Job
    from fastprompt.training.launch import Launch

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file; see docs/training.md.")]
Output = Annotated[Path | None, typer.Option(help="Folder for prompts and results, in place of the file's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what the output folder holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where the output folder holds a former run.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Instead of what the file says: run.seed=3, prompt.NAME.steps=9."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Load and check everything, train nothing.")]


def train(
    config: Config,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set_: Set = None,
    compare: Annotated[
        str | None, typer.Option(metavar="KINDS", help="Other ways to learn the same: full,lora,probe,probe_mean.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train every prompt of a config file, all in one run; with --compare also in other ways."""
    need_packages()
    from fastprompt.training.config import load_config
    from fastprompt.training.files import main_process
    from fastprompt.training.launch import check_launch, prepare_launch, train_file

    settings = load_config(config, [*(set_ or []), *_comparators(compare)])
    if dry_run:
        launch = prepare_launch(settings)
        emit(_plan(launch, check_launch(launch)), as_json, _render_plan)
        return
    with live_table() as listen:
        report = train_file(settings, output=output, resume=resume, overwrite=overwrite, listen=listen)
    if main_process():
        emit(report, as_json, _render)


def need_packages() -> None:
    """Raises ArgumentError where what reads config files and data sets is not installed."""
    from fastprompt.training import packages

    packages.need("training from a config file", "pydantic", "datasets")


def _comparators(kinds: str | None) -> list[str]:
    """`--compare` as an override of the config."""
    from fastprompt.training.comparators import KINDS

    if kinds is None:
        return []
    named = [kind.strip() for kind in kinds.split(",")]
    if wrong := [kind for kind in named if kind not in KINDS]:
        raise ArgumentError(f"--compare has {wrong[0]!r}, expected {', '.join(KINDS)}, separated by commas")
    tables = ", ".join(f'{{ kind = "{kind}" }}' for kind in named)
    return [f"comparator=[{tables}]"]


def _plan(launch: Launch, jobs: list[Job]) -> dict[str, Any]:
    """What a run of these jobs would do."""
    return {
        "backbone": launch.config.run.backbone,
        "prompts": [
            {
                "name": job.name,
                "method": job.config.method if job.config else f"shares {job.shares}" if job.shares else "stored",
                "task": job.task.name,
                "examples": len(job.train),
                "validation": 0 if job.validation is None else len(job.validation),
                "steps": job.total_steps(),
            }
            for job in jobs
        ],
        "output": str(launch.output),
    }


def _render_plan(plan: dict[str, Any]) -> None:
    table = Table("prompt", "method", "task", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("examples", "validation", "steps"):
        table.add_column(column, justify="right")
    for prompt in plan["prompts"]:
        table.add_row(*(Text(str(value)) for value in prompt.values()))
    console.print(table)
    console.print("Everything was loaded and checked, nothing trained.")


def _render(report: dict[str, Any]) -> None:
    table = Table("prompt", "method", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("tokens", "trained", "score", "at step", "steps"):
        table.add_column(column, justify="right")
    table.add_column("ended")
    for row in report["prompts"]:
        score = "" if row["score"] is None else f"{row['metric']} {number(row['score'])}"
        at = "" if row["best_step"] is None else str(row["best_step"])
        counts = (str(row["virtual_tokens"]), f"{row['trained_parameters']:,}", score, at, str(row["steps"]))
        table.add_row(*map(Text, (row["name"], row["method"], *counts, row["stopped"])))
    console.print(table)
    run = report["run"]
    peak = "" if run["peak_memory"] is None else f", peak memory {size(run['peak_memory'])}"
    console.print(
        f"{len(report['prompts'])} prompts in one run: {run['steps']} steps in {run['seconds']:.0f} s "
        f"({run['step_seconds']:.3f} s a step){peak}."
    )
    if report["comparison"]:
        console.print()
        console.print(comparison_table(report["comparison"]))
    console.print(f"Results and prompts: {Path(report['prompts'][0]['folder']).parents[1]}", markup=False)


def comparison_table(lines: list[dict[str, Any]]) -> Table:
    """Ways to learn each task, with what they cost."""
    table = Table("task", "way", title="Ways to learn", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("score", "trained\nparameters", "peak\nmemory", "step\nseconds", "stored\nbytes"):
        table.add_column(column, justify="right")
    for line in lines:
        if line["refused"]:
            table.add_row(Text(line["task"]), Text(line["way"]), Text(line["refused"], style="dim"))
            continue
        peak = "" if line["peak_memory"] is None else size(line["peak_memory"])
        stored = "" if line["stored_bytes"] is None else f"{line['stored_bytes']:,}"
        counts = (f"{line['trained_parameters']:,}", peak, f"{line['step_seconds']:.3f}", stored)
        score = "" if line["score"] is None else f"{line['metric']} {number(line['score'])}"
        table.add_row(*map(Text, (line["task"], line["way"], score, *counts)))
    return table


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
