"""`fastprompt import` and `fastprompt export`: PEFT adapters to prompts and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastprompt.cli.backbones import OptionalBackbone, backbone_spec
from fastprompt.cli.inspect import description, render
from fastprompt.cli.output import Json, emit
from fastprompt.errors import ArgumentError

Source = Annotated[Path, typer.Argument(metavar="SRC", help="The folder to read.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST if it is a prompt already.")]


def import_(
    source: Source,
    target: Target,
    backbone: OptionalBackbone = None,
    task: Annotated[int | None, typer.Option(help="Which task of a multitask prompt to take.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn a PEFT adapter folder into a prompt folder; without --backbone the one that the adapter names is used."""
    from fastprompt import peft_format, store

    held = description(source)
    if held["format"] != "peft":
        raise ArgumentError(f"SRC is {source}, a prompt folder already, expected a PEFT adapter's")
    backbone = backbone or held["backbone"]
    if not backbone or not isinstance(backbone, str):
        raise ArgumentError(f"{source} names no backbone: give --backbone, the model that it was trained with")
    prompt = peft_format.read_peft(source, backbone_spec(backbone), task_id=task)
    store.save_prompt(target, prompt, overwrite=overwrite)
    emit(description(target), as_json, render)


def export(
    source: Source,
    target: Target,
    backbone: OptionalBackbone = None,
    format: Annotated[str, typer.Option(help="What to write: peft, or vllm for a store that vLLM reads.")] = "peft",
    task_type: Annotated[str | None, typer.Option(help="PEFT's task type, where the prompt names none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="For vllm: float32, bfloat16 or float16; the backbone's.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a prompt folder as a PEFT adapter, or a folder of prompts as a store for vLLM, compiled by --backbone.

    A PEFT adapter is checked against --backbone, where it is given, and names it.
    """
    from fastprompt import peft_format, store

    if format == "vllm":
        from fastprompt.cli.export_vllm import export_to_vllm, raise_refused, show

        done = export_to_vllm(source, target, backbone, dtype)
        emit(done, as_json, show)
        raise_refused(done["refused"])
        return
    if format != "peft":
        raise ArgumentError(f"--format is {format!r}, expected 'peft' or 'vllm'")
    prompt = store.load_prompt(source, backbone_spec(backbone) if backbone else None)
    peft_format.write_peft(target, prompt, task_type=task_type, base_model_name_or_path=backbone, overwrite=overwrite)
    emit(description(target), as_json, render)
