"""Backbones as the command line names them: a folder, an id on the hub, or `embedded`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprompt.demo import EMBEDDED as EMBEDDED
from fastprompt.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastprompt.spec import BackboneSpec

HELP = "A transformers model: a folder, an id on the hub, or 'embedded' for the one in the package."
Backbone = Annotated[str, typer.Option("--backbone", help=HELP)]
OptionalBackbone = Annotated[str | None, typer.Option("--backbone", help=HELP)]


def load_backbone(path: str, **options: Any) -> PreTrainedModel:
    """The model of the class that its config names, in evaluation mode; `options` go to `from_pretrained`."""
    import transformers

    from fastprompt import demo

    with _explained(path):
        if path == EMBEDDED:
            return demo.backbone()
        config = transformers.AutoConfig.from_pretrained(path)
        named = (config.architectures or ["AutoModel"])[0]
        return getattr(transformers, named, transformers.AutoModel).from_pretrained(path, **options).eval()


def load_tokenizer(path: str) -> Any:
    """The backbone's tokenizer, padding on the left, with a padding token."""
    from transformers import AutoTokenizer

    from fastprompt import demo

    with _explained(path):
        tokenizer = demo.tokenizer() if path == EMBEDDED else AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def backbone_spec(path: str) -> BackboneSpec:
    """What prompts must know about the backbone."""
    from fastprompt.integrations.transformers.probe import inspect_backbone

    return inspect_backbone(load_backbone(path)).spec


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what transformers raises for a model that is missing or malformed into one error."""
    from safetensors import SafetensorError

    local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if path != EMBEDDED and local and not os.path.isdir(path):
        raise ArgumentError(f"--backbone is {path!r}, which is no folder: expected a transformers model")
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArgumentError(
            f"--backbone is {path!r}, which transformers cannot load: {error}: expected a folder with config.json, "
            f"weights and tokenizer, an id on the hub, or {EMBEDDED!r}"
        ) from error
