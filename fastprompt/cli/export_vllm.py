"""`fastprompt export --format vllm`, and the store that `fastprompt serve --engine vllm` begins with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.cli.backbones import EMBEDDED, load_backbone
from fastprompt.cli.output import fields
from fastprompt.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from fastprompt.integrations.vllm import PrefixStore


def export_to_vllm(source: Path, target: Path, backbone: str | None, dtype: str | None) -> dict[str, Any]:
    """Bring the store `target` up to date with the prompt, or the folder of prompts, `source`.

    A single prompt is added under its folder's name; a folder's prompts are all that the store names afterwards. What
    vLLM cannot hold is left out and said in "refused", by name. Errors: ArgumentError without a backbone.
    """
    from fastprompt.integrations.vllm.export import export_folder, export_prompts
    from fastprompt.prompt_format import METADATA
    from fastprompt.serving.registry import PromptRegistry

    if not source.is_dir():
        raise ArgumentError(f"SRC is {source}, expected a prompt's folder, or a folder of such folders")
    store, compiler = open_store(target, backbone, dtype)
    held = store.backbone()
    if (source / METADATA).is_file():
        folder, name = os.path.split(os.path.abspath(source))
        count, refused = export_prompts(store, PromptRegistry(folder, held.spec), [name], compiler)
    else:
        count, refused = export_folder(store, source, compiler)
    shown = {"store": str(store.folder), "backbone": held.spec.describe(), "dtype": held.dtype}
    return shown | {"prompts": count, "refused": refused}


def show(data: dict[str, Any]) -> None:
    """Print what was exported for people."""
    fields({name: value for name, value in data.items() if name not in ("store", "refused")}, data["store"])


def raise_refused(refused: dict[str, str]) -> None:
    """Raise UnsupportedError for prompts that were left out."""
    if refused:
        raise UnsupportedError("\n".join(refused.values()))


def open_store(folder: Path, backbone: str | None, dtype: str | None) -> tuple[PrefixStore, Any]:
    """A store for a backbone, made where it is not there yet, and what compiles embedding prompts for it."""
    import torch

    from fastprompt.integrations.vllm import PrefixStore
    from fastprompt.integrations.vllm.export import Compiler, prepare_store
    from fastprompt.serving.launch import DTYPES

    if dtype not in (None, *DTYPES):
        raise ArgumentError(f"--dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if not backbone or backbone == EMBEDDED:
        raise ArgumentError(
            f"--backbone is {backbone!r}, expected the model that vLLM runs: a folder, or an id on the hub"
        )
    store, model = PrefixStore(folder), _where(backbone)
    if store.exists:
        held = store.backbone()
        for option, given, there in (("dtype", dtype or held.dtype, held.dtype), ("backbone", model, held.model)):
            if given != there:
                raise ArgumentError(
                    f"--{option} is {given!r}, and {folder} holds prefixes made with {there!r}: export into another "
                    "folder, or remove this one"
                )
        dtype = held.dtype
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    compiler = Compiler(lambda: load_backbone(backbone, **options))
    prepare_store(store, model, compiler)
    return store, compiler


def _where(backbone: str) -> str:
    """A backbone as other processes can name it: a folder by its full path."""
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone
