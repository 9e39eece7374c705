"""`fastprompt info`: what is installed, what runs here and why."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastprompt.cli.backbones import OptionalBackbone, load_backbone
from fastprompt.cli.explain import explained, render
from fastprompt.cli.output import Json, console, emit, fields
from fastprompt.errors import FastPromptError

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "triton", "vllm")


_Shape = Annotated[
    str | None,
    typer.Option(
        "--explain",
        metavar="SHAPE",
        help="Explain instead how such a decoding step runs on a GPU, as in "
        "'rows=128 prompts=8 P=256 S=512 heads=32/8 D=128'.",
    ),
]


def info(backbone: OptionalBackbone = None, explain: _Shape = None, as_json: Json = False) -> None:
    """Show versions, devices and which implementation of every op runs here; with --backbone its prompt path."""
    from fastprompt import dispatch, env

    if explain is not None:
        return emit(explained(explain), as_json, render)
    chosen, problem = _chosen()
    data: dict[str, Any] = {
        "versions": _versions(),
        "threads": _threads(),
        "devices": _devices(),
        "environment": env.in_force(),
        "ops": [vars(row) for row in dispatch.explain()],
        "chosen": chosen,
        "problem": problem,
        "backbone": _why(backbone) if backbone else None,
    }
    emit(data, as_json, _render)


def _versions() -> dict[str, str | None]:
    import fastprompt

    found: dict[str, str | None] = {"fastprompt": fastprompt.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _threads() -> dict[str, int]:
    import torch

    return {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{platform.machine()}, torch for {torch.backends.cpu.get_cpu_capability()}, {_native_kernels()}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    return devices


def _native_kernels() -> str:
    from fastprompt import native

    try:
        return f"native kernels for {native.load().isa()}"
    except FastPromptError:  # the table of ops says why
        return "no native kernels"


def _chosen() -> tuple[dict[str, dict[str, str]], str | None]:
    """Implementation of every op by device type, and why some have none."""
    import torch

    from fastprompt import dispatch

    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    chosen: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    problem = None
    for kind, names in chosen.items():
        for op in dispatch.OPS:
            try:
                names[op] = dispatch.choose(op, None, torch.device(kind), torch.float32)
            except FastPromptError as error:  # FASTPROMPT_IMPL asks for what cannot run
                problem = str(error)
    return chosen, problem


def _why(path: str) -> dict[str, str]:
    from fastprompt import PromptedModel

    first, *reasons = PromptedModel(load_backbone(path)).why().splitlines()
    return {"path": path, "prompts": first, "reasons": "; ".join(r.strip() for r in reasons)}


def _render(data: dict[str, Any]) -> None:
    fields({name: value or "not installed" for name, value in data["versions"].items()}, "Versions")
    console.print()
    fields(data["devices"] | {"torch threads": str(data["threads"]["intra_op"])}, "Devices")
    console.print()
    if data["environment"]:
        fields(data["environment"], "Environment")
        console.print()
    console.print(_ops_table(data["ops"], data["chosen"]))
    if data["problem"]:
        console.print(data["problem"], style="red", markup=False)
    if data["backbone"]:
        console.print()
        fields(data["backbone"], "Backbone")


def _ops_table(rows: list[dict[str, Any]], chosen: dict[str, dict[str, str]]) -> Table:
    table = Table(title="Ops", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "implementation", "here", "reason"):
        table.add_column(column)
    op = None
    for row in rows:
        picked = ", ".join(kind for kind, names in chosen.items() if names.get(row["op"]) == row["impl"])
        here = f"[green]runs on {picked}[/]" if picked else "can run" if row["available"] else "[dim]no[/]"
        table.add_row(row["op"] if row["op"] != op else "", row["impl"], here, row["reason"])
        op = row["op"]
    return table
