"""Prompts on disk: a folder of `prompt.safetensors` and `prompt.json`. Nothing else is ever read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastprompt.errors import PromptFileError
from fastprompt.folders import current_folder, replace_folder
from fastprompt.prompt_format import (
    FORMAT_VERSION,
    METADATA,
    WEIGHTS,
    check_finite,
    parse_metadata,
    parse_prompt,
    prompt_digest,
    prompt_files,
    prompt_tensors,
    read_tensors,
    sha256,
)
from fastprompt.prompts import SoftPrompt
from fastprompt.spec import BackboneSpec

__all__ = [
    "FORMAT_VERSION",
    "METADATA",
    "WEIGHTS",
    "check_finite",
    "inspect_prompt",
    "load_prompt",
    "other_format",
    "prompt_digest",
    "prompt_tensors",
    "read_tensors",
    "save_prompt",
]

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save_prompt(
    path: str | os.PathLike[str], prompt: SoftPrompt, *, record: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write `prompt` as the folder `path`, in one step: a reader finds the old version or the new one.

    Semantics: the effective weights are stored (a reparameterisation is collapsed), float32, with the head, the labels
    and `record` (a JSON object about the training; None keeps the prompt's own). Equal prompts give equal bytes.

    Errors: DuplicatePromptError if `path` exists and `overwrite` is false; ArgumentError for weights that are not
    finite or a record that is not JSON; PromptFileError if `path` cannot be written. Either way nothing changed.
    """
    return replace_folder(path, prompt_files(prompt, record), overwrite=overwrite)


def load_prompt(path: str | os.PathLike[str], spec: BackboneSpec | None = None) -> SoftPrompt:
    """Read the prompt in the folder `path`: trainable, collapsed, float32, on the CPU.

    Args:
        spec: the backbone it must fit; None accepts the backbone the file names.
    Errors: PromptFileError for a missing, truncated, altered, non-finite or unreadable prompt;
    IncompatiblePromptError for one made for another backbone.
    """
    metadata, weights = _read(path)
    return parse_prompt(metadata, weights, spec, where=os.fspath(path))


def inspect_prompt(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `prompt.json` says, checked, without reading the weights."""
    return _read(path, weights_too=False)[0]


def other_format(folder: Path, wanted: str) -> PromptFileError:
    """What to raise for a `folder` that has no file `wanted`."""
    if not folder.exists():
        return PromptFileError(f"{folder} does not exist: expected a folder with {wanted}")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [folder.name]
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        return PromptFileError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when opened: only safetensors is read; "
            "save it again as safetensors with the program that made it"
        )
    if not folder.is_dir():
        return PromptFileError(f"{folder} is a file: expected a folder with {wanted}")
    hint = ": expected a prompt's folder"
    if "adapter_config.json" in names:
        hint = "; it is a PEFT adapter: load it as one"
    return PromptFileError(f"{folder} has no readable {wanted}, only {names[:8]}{hint}")


def _read(path: str | os.PathLike[str], *, weights_too: bool = True) -> tuple[dict[str, Any], bytes]:
    """Metadata and weights of one version, though a writer may replace the folder meanwhile."""
    looks: list[tuple[object, ...]] = []
    while len(looks) < 3 or looks[-3:] != looks[-1:] * 3:  # three equal looks: nobody is replacing it
        folder = current_folder(path)
        identity, raw = _identity(folder), _bytes(folder / METADATA)
        weights = _bytes(folder / WEIGHTS) if weights_too else b""
        if raw is not None:
            metadata = parse_metadata(raw, str(folder / METADATA))
            if weights is not None and (not weights_too or sha256(weights) == metadata["sha256"]):
                return metadata, weights
        looks.append((identity, raw, None if weights is None else len(weights)))
    if raw is None or weights is None:
        raise other_format(folder, METADATA if raw is None else WEIGHTS)
    raise PromptFileError(
        f"{folder / WEIGHTS} ({len(weights)} bytes) does not match the digest in {METADATA}: it is truncated or "
        "altered; save or copy the prompt again"
    )


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
