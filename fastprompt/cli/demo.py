"""`fastprompt demo`: the main job on the embedded backbone, shown."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastprompt.cli.backbones import EMBEDDED, HELP, load_backbone, load_tokenizer
from fastprompt.cli.output import Json, console, emit, errors
from fastprompt.errors import ArgumentError

if TYPE_CHECKING:
    from fastprompt.demo.run import Example
    from fastprompt.demo.training import Listener

_STAGES = {
    "train": "training the prompts together",
    "answer": "answering in one mixed batch",
    "check": "answering row by row",
    "time": "timing the ways in turn",
}
_METHODS = {
    "prompt_tuning": "Prompt Tuning",
    "p_tuning": "P-Tuning",
    "prefix_tuning": "Prefix Tuning",
    "p_tuning_v2": "P-Tuning v2",
}


def demo(
    backbone: Annotated[str, typer.Option("--backbone", help=HELP)] = EMBEDDED,
    out: Annotated[Path, typer.Option(help="Where the trained prompts are saved.")] = Path("demo-prompts"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps and rows: shows that everything runs.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; 1 for the embedded backbone, which is too small for more.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a prompt by each method, answer with all of them in one batch, check and time it."""
    import torch

    from fastprompt import PromptedModel
    from fastprompt.demo.run import QUICK, Settings, run

    started = time.perf_counter()
    if threads or backbone == EMBEDDED:
        torch.set_num_threads(threads or 1)
    options = {} if backbone == EMBEDDED else {"dtype": torch.float32}
    model = PromptedModel(load_backbone(backbone, **options), load_tokenizer(backbone))
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ArgumentError(f"--backbone is a {type(model.backbone).__name__}, expected a causal language model")
    with _bars() as listen:
        report = run(model, QUICK if quick else Settings(), out, listen)
    data = asdict(report) | {
        "green": report.equality.green,
        "embedded": backbone == EMBEDDED,
        "quick": quick,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "out": str(out),
        "next": next_steps(backbone, out, report.examples),
    }
    emit(data, as_json, _render)


def next_steps(backbone: str, out: Path, examples: Sequence[Example]) -> list[str]:
    """Three commands that go on from here."""
    first, second = [(str(e.prompt), e.text) for e in examples[:2]]
    generate = ["fastprompt", "generate", "--backbone", backbone]
    for name, text in (first, second):
        generate += ["--prompt", f"{name}={out / name}", "--use", name, "--text", text]
    return [
        shlex.join(generate),
        shlex.join(["fastprompt", "inspect", str(out / first[0])]),
        shlex.join(["fastprompt", "export", str(out / second[0]), f"{out / second[0]}-peft", "--overwrite"]),
    ]


@contextmanager
def _bars() -> Iterator[Listener]:
    """Progress bars on standard error, one a stage, driven by the listener."""
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[remark]}"), console=errors) as progress:
        bars: dict[str, Any] = {}

        def listen(stage: str, done: int, total: int, remark: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(_STAGES[stage], remark=remark)
            progress.update(bars[stage], completed=done, total=total, remark=remark)

        yield listen


def _render(data: dict[str, Any]) -> None:
    training = data["training"]
    console.print(f"\nBackbone {data['backbone']}, {data['backbone_parameters']:,} parameters, frozen.", markup=False)
    kept = (
        "every weight of the backbone as before" if training["backbone_unchanged"] else "[red]the backbone changed[/]"
    )
    console.print(
        f"Prompts trained together in one run: {training['steps']} steps of {training['rows_per_step']} mixed rows in "
        f"{training['seconds']:.0f} s; {kept}.\n"
    )
    _print_scores(data["lines"])
    if data["quick"]:
        console.print("Trained for a moment only: leave out --quick to see what the prompts can learn.", style="yellow")
    if not data["embedded"]:
        console.print(
            "The tasks speak of a world that only the embedded backbone knows, and the learning rates were chosen for "
            "it: scores on another backbone may be poor.",
            style="yellow",
        )
    _print_examples(data["examples"], data["batch"])
    _print_equality(data["equality"], data["green"])
    if data["timing"]:
        _print_times(data["timing"], data["threads"])
    console.print(f"\nDone in {data['seconds']:.0f} s. The prompts are in {data['out']}; go on with:", markup=False)
    activate = Path(sys.executable).with_name("activate")
    off_path = shutil.which("fastprompt") is None and activate.exists()
    for command in [f". {shlex.quote(str(activate))}"] * off_path + data["next"]:
        console.print(f"  {command}", style="cyan", markup=False, soft_wrap=True)


def _table(left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _print_scores(lines: Sequence[dict[str, Any]]) -> None:
    numbers = ("virtual\ntokens", "trained\nparameters", "bare\nmodel", "written\nprompt", "trained\nprompt")
    table = _table(("prompt", "method"), numbers)
    for line in lines:
        table.add_row(
            line["prompt"],
            _METHODS[line["method"]],
            str(line["virtual_tokens"]),
            f"{line['trained_parameters']:,} ({line['share']:.1%})",
            *(f"{line[score]:.0%}" for score in ("bare", "hand_written", "trained")),
        )
    counts = sorted(line["tested"] for line in lines)
    console.print(f"[bold]Exact match on held-out inputs[/], {counts[0]} to {counts[-1]} a task")
    console.print(table)


def _print_examples(examples: Sequence[dict[str, Any]], batch: int) -> None:
    table = _table(("prompt", "input", "answer"))
    for example in examples:
        table.add_row(*(Text(text or "none") for text in example.values()))
    console.print(f"[bold]One mixed batch[/]: {len(examples)} of its {batch} rows")
    console.print(table)


def _print_equality(equality: dict[str, Any], green: bool) -> None:
    console.print(
        f"{equality['identical']} of {equality['rows']} answers under {equality['prompts']} prompts are token by token "
        f"those that each row gets alone; logits differ by at most {equality['logit_difference']:.1e} of their scale "
        f"({equality['tolerance']:.0e} allowed).\n",
        style="green" if green else "red",
    )
    if not green:
        console.print("A mixed batch and rows alone differ, so no times are shown.", style="red")


def _print_times(timing: dict[str, Any], threads: int) -> None:
    table = _table(("",), ("seconds", "against mixed"))
    ways = {"mixed": "one mixed batch", "by_prompt": "a batch for each prompt", "one_by_one": "row by row"}
    for way, label in ways.items():
        table.add_row(label, f"{timing[way]:.3f}", f"{timing[way] / timing['mixed']:.1f}x")
    console.print(
        f"[bold]The same answers in three ways[/]: {timing['rows']} rows under {timing['prompts']} prompts and none, "
        f"median of {timing['repeats']} turns, CPU threads: {threads}"
    )
    console.print(table)
