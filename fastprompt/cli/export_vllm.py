"""`fastprompt export --format vllm`, and the store that `fastprompt serve --engine vllm` begins with."""

from __future__ import annotations

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
    from fastprompt.integrations.vllm.export import export_folder, export_prompt, naming
    from fastprompt.prompt_format import METADATA
    from fastprompt.serving.registry import PromptRegistry

    store, compiler = open_store(target, backbone, dtype)
    if (source / METADATA).is_file():
        entries, refused = dict[str, Any](), dict[str, str]()
        name = source.resolve().name
        registry = PromptRegistry(source.resolve().parent, store.backbone().spec)
        with naming(name, refused):
            version = registry.current(name)
            entries[name] = export_prompt(store, name, registry.load(version), version, compiler)
    elif source.is_dir():
        entries, refused = export_folder(store, source, compiler)
    else:
        raise ArgumentError(f"SRC is {source}, expected a prompt's folder, or a folder of such folders")
    held = store.backbone()
    shown = {"store": str(store.folder), "backbone": held.spec.describe(), "dtype": held.dtype}
    return shown | {"prompts": len(entries), "refused": refused}


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
    store = PrefixStore(folder)
    wanted = dtype or (store.backbone().dtype if (store.folder / "backbone.json").exists() else None)
    options = {} if wanted is None else {"dtype": getattr(torch, wanted)}
    compiler = Compiler(lambda: load_backbone(backbone, **options))
    held = prepare_store(store, _where(backbone), compiler)
    if dtype not in (None, held.dtype):
        raise ArgumentError(
            f"--dtype is {dtype!r}, and {folder} holds prefixes in {held.dtype}: export into another folder"
        )
    return store, compiler


def _where(backbone: str) -> str:
    """A backbone as other processes can name it: a folder by its full path."""
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone
