"""`fastprompt sweep`: many settings of every prompt of a config file, the best of them kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastprompt.cli.live import number, progress_table
from fastprompt.cli.output import Json, console, emit, errors
from fastprompt.cli.train import Config, DryRun, Output, Overwrite, Resume, Set, need_packages

if TYPE_CHECKING:
    from fastprompt.training.sweep.run import SweepListener, SweepProgress

SHOWN = 16


def sweep(
    config: Config,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    set_: Set = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw score against trained parameters: a .png or .svg file.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Try many settings of every prompt of a config file, as many at once as fit, and keep the best."""
    need_packages()
    from fastprompt.training.launch import check_sweep, prepare_sweep, sweep_file

    if dry_run:
        launch, candidates = prepare_sweep(config, set_ or [])
        check_sweep(launch, candidates)
        data = {"candidates": [{"name": c.name, "base": c.base, "values": dict(c.values)} for c in candidates]}
        emit(data, as_json, _render_plan)
        return
    with _live() as listen:
        result = sweep_file(
            config, overrides=set_ or [], output=output, resume=resume, overwrite=overwrite, listen=listen
        )
    if plot is not None:
        from fastprompt.training.sweep.plot import plot as draw

        draw(result.results, plot)
    emit(asdict(result) | {"output": str(result.output)}, as_json, _render)


@contextmanager
def _live() -> Iterator[SweepListener]:
    """A table on standard error of those candidates of the present run that stand best."""
    with Live(console=errors, refresh_per_second=4, transient=True) as live:

        def show(sweep: SweepProgress) -> None:
            head = f"run {sweep.run + 1} of {sweep.runs}; {sweep.done} of {sweep.candidates} candidates are done"
            live.update(Group(Text(head, style="bold"), progress_table(sweep.progress, SHOWN)))

        yield show


def _render_plan(data: dict[str, Any]) -> None:
    table = Table("candidate", "values", box=SIMPLE_HEAD, pad_edge=False)
    for candidate in data["candidates"]:
        table.add_row(Text(candidate["name"]), Text(_values(candidate["values"])))
    console.print(table)
    console.print(f"{len(data['candidates'])} candidates. Everything was loaded and checked, nothing trained.")


def _render(data: dict[str, Any]) -> None:
    for base, best in data["best"].items():
        mine = [result for result in data["results"] if result["base"] == base]
        ranked = sorted(mine, key=lambda result: -_number(result["best_score"]))
        table = Table(title=Text(base), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("candidate")
        table.add_column(best["metric"], justify="right")
        table.add_column("trained", justify="right")
        table.add_column("steps", justify="right")
        table.add_column("ended")
        table.add_column("values")
        for result in ranked[:SHOWN]:
            numbers = (number(result["best_score"]), f"{result['trained_parameters']:,}", str(result["steps"]))
            table.add_row(*map(Text, (result["name"], *numbers, result["stopped"], _values(result["values"]))))
        if len(ranked) > SHOWN:
            table.caption = f"the best {SHOWN} of {len(ranked)}"
        console.print(table)
        if settings := [setting for setting in data["seeds"] if setting["base"] == base]:
            console.print(_seeds_table(settings))
    console.print(f"All results: {data['output']}/sweep.jsonl; best prompts: {data['output']}/best", markup=False)


def _seeds_table(settings: list[dict[str, Any]]) -> Table:
    """Settings that differ in the seed only, the best mean first."""
    ranked = sorted(settings, key=lambda setting: -_number(setting["mean"]))
    table = Table(title=f"{settings[0]['metric']} over seeds", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("mean", "spread", "seeds", "trained"):
        table.add_column(column, justify="right")
    table.add_column("values")
    for setting in ranked[:SHOWN]:
        numbers = number(setting["mean"]), number(setting["spread"], 2), str(setting["scored"])
        trained = f"{setting['trained_parameters']:,}"
        table.add_row(*map(Text, (*numbers, trained, _values(setting["values"]))))
    if len(ranked) > SHOWN:
        table.caption = f"the best {SHOWN} of {len(ranked)}"
    return table


def _values(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def _number(score: float | None) -> float:
    """A score to rank by; what has none comes last."""
    return float("-inf") if score is None else score
