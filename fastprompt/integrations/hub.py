"""Prompts on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fastprompt.errors import ArgumentError, PromptFileError


def local_folder(path: str | Path) -> Path:
    """A folder as it is, or the local copy of a hub repository `owner/name`; only safetensors and json are fetched."""
    if not isinstance(path, (str, Path)):
        raise ArgumentError(f"path is {type(path).__name__}, expected a prompt's folder, or an adapter's id on the hub")
    folder = Path(path)
    if folder.exists() or folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # no network, no such repository, no right to it
        raise PromptFileError(f"{path} is no folder here, and the hub has no prompt of that id: {error}") from error
