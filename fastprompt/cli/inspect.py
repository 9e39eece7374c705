"""`fastprompt inspect`: what a stored prompt is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from fastprompt.cli.output import Json, console, emit, fields

_LAYERS = 1024  # beyond which their number is shown as it stands in the file


def inspect(
    path: Annotated[Path, typer.Argument(help="A prompt's folder or a PEFT adapter's.")], as_json: Json = False
) -> None:
    """Check a prompt folder or a PEFT adapter and show what it holds."""
    emit(description(path), as_json, render)


def description(path: Path) -> dict[str, Any]:
    """What the folder `path` holds, the same fields for both formats; its weights are read and checked."""
    from fastprompt.peft_format import is_peft_folder

    return _peft(path) if is_peft_folder(path) else _own(path)


def render(data: dict[str, Any]) -> None:
    """Print a description for people."""
    shown = data | {"bytes": f"{data['bytes']:,}", "parameters": f"{data['parameters']:,}"}
    fields({name: value for name, value in shown.items() if name not in ("path", "config", "record")}, data["path"])
    for part in ("config", "record"):
        if data[part]:
            console.print()
            fields(data[part], part)


def _own(path: Path) -> dict[str, Any]:
    from fastprompt import store

    prompt, metadata = store.load_prompt(path), store.inspect_prompt(path)
    tensors = store.prompt_tensors(prompt)
    head = prompt.head
    return {
        "path": str(path),
        "format": "fastprompt",
        "method": metadata["method"],
        "length": prompt.length,
        "layers": metadata["layers"],
        "backbone": prompt.spec.describe(),
        "fingerprint": metadata["fingerprint"],
        "sha256": metadata["sha256"],
        "bytes": (path / store.WEIGHTS).stat().st_size,
        "parameters": sum(t.numel() for t in tensors.values()),
        "head": head and {f"{head.module}.{n}".strip("."): list(t.shape) for n, t in head.tensors().items()},
        "labels": metadata["labels"],
        "task_type": metadata["task_type"],
        "config": metadata["config"],
        "record": metadata["record"],
    }


def _peft(path: Path) -> dict[str, Any]:
    from fastprompt import store
    from fastprompt.peft_format.layout import CONFIG, WEIGHTS
    from fastprompt.peft_format.read import adapter_config

    try:
        config = dict(adapter_config((path / CONFIG).read_bytes(), str(path / CONFIG)))
        content = (path / WEIGHTS).read_bytes()
    except OSError:
        raise store.other_format(path, WEIGHTS) from None
    tensors = store.read_tensors(content, str(path / WEIGHTS))
    layers = config.get("num_layers") or 0 if config.get("peft_type") in ("PREFIX_TUNING", "CARTRIDGE") else 0
    head = {n.removeprefix("base_model."): list(t.shape) for n, t in tensors.items() if n.startswith("base_model.")}
    return {
        "path": str(path),
        "format": "peft",
        "method": config.get("peft_type"),
        "length": config.get("num_virtual_tokens"),
        "layers": list(range(layers)) if isinstance(layers, int) and layers <= _LAYERS else layers,
        "backbone": config.get("base_model_name_or_path"),
        "fingerprint": None,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": sum(t.numel() for t in tensors.values()),
        "head": head or None,
        "labels": None,
        "task_type": config.get("task_type"),
        "config": config,
        "record": None,
    }
