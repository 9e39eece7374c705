"""Prompts made into prefixes that vLLM can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import FastPromptError, UnsupportedError
from fastprompt.integrations.vllm.prefix_file import prefix_bytes
from fastprompt.integrations.vllm.store import Entry, PrefixStore, StoreBackbone
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.versions import PromptVersion
from fastprompt.spec import BackboneSpec, Prefix, unflatten

Compile = Callable[[Sequence[torch.Tensor]], Sequence[Prefix]]


def check_backbone(spec: BackboneSpec) -> None:
    """Raise UnsupportedError for a backbone whose prompts cannot be prefixes in vLLM's pages."""
    if spec.encoder_decoder or not spec.causal:
        kind = "an encoder-decoder" if spec.encoder_decoder else "an encoder"
        raise UnsupportedError(
            f"{spec.describe()} is {kind}, and only causal decoders are served through vLLM: use fastprompt serve"
        )
    if len(set(spec.layers)) != 1:
        raise UnsupportedError(
            f"{spec.describe()} has layers of different shapes, which vLLM keeps in several groups of pages: use "
            "fastprompt serve"
        )


def check_prompt(name: str, prompt: SoftPrompt) -> None:
    """Raise UnsupportedError for a prompt that is not just keys and values in every layer before the text."""
    if prompt.head is not None:
        what = "a head of its own, and vLLM answers with the backbone's"
    elif prompt.in_place:
        what = "its virtual tokens in place, and vLLM's pages begin with a prefix"
    elif prompt.kind == "prefix" and prompt.config.prefix_layers(prompt.spec) != tuple(range(prompt.spec.num_layers)):
        what = "a prefix in some layers only, and a page of vLLM's holds a token in all of them"
    else:
        return
    raise UnsupportedError(f"prompt {name!r} has {what}: use fastprompt serve for it")


@torch.no_grad()
def to_prefix(prompt: SoftPrompt, spec: BackboneSpec, compile: Compile) -> Prefix:
    """A checked prompt as keys and values of every layer; `compile` turns embeddings into them."""
    weights = prompt.weights()
    if prompt.kind == "prefix":
        return unflatten(weights, spec, prompt.config.prefix_layers(spec))
    return compile([weights])[0]


def store_prefix(store: PrefixStore, prefix: Prefix) -> str:
    """Write a prefix in the store's dtype; its digest."""
    return store.write_prefix(prefix_bytes(prefix, getattr(torch, store.backbone().dtype)))


def entry_of(version: PromptVersion, digest: str) -> Entry:
    """What a name stands for, once its prefix is written."""
    return Entry(
        digest=digest,
        length=version.length,
        version=version.version,
        method=version.method,
        kind=version.kind,
        bytes=version.bytes,
        task_type=version.task_type,
        created=version.created,
    )


def export_prompt(store: PrefixStore, name: str, prompt: SoftPrompt, version: PromptVersion, compile: Compile) -> Entry:
    """Write a prompt's prefix and let the name stand for it.

    Errors: UnsupportedError for a prompt that vLLM's pages cannot hold; PromptFileError where the disk fails.
    """
    check_prompt(name, prompt)
    entry = entry_of(version, store_prefix(store, to_prefix(prompt, store.backbone().spec, compile)))
    store.set_name(name, entry)
    return entry


class Compiler:
    """The backbone, loaded when an embedding prompt first needs it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._backbone: Any = None

    @property
    def backbone(self) -> Any:
        """What `inspect_backbone` finds out about it."""
        if self._backbone is None:
            from fastprompt.integrations.transformers.probe import inspect_backbone

            self._backbone = inspect_backbone(self._load().eval())
        return self._backbone

    def __call__(self, embeddings: Sequence[torch.Tensor]) -> Sequence[Prefix]:
        from fastprompt.integrations.transformers.backbone import evaluating

        with torch.no_grad(), evaluating(self.backbone.model):
            return self.backbone.compile(embeddings)


def prepare_store(store: PrefixStore, model: str, compiler: Compiler) -> StoreBackbone:
    """The store's backbone; a folder that is no store yet becomes one for the compiler's.

    Errors: UnsupportedError for a backbone whose prompts vLLM cannot hold.
    """
    try:
        return store.backbone()
    except FastPromptError:
        found = compiler.backbone
    check_backbone(found.spec)
    made = StoreBackbone(model, str(found.dtype).removeprefix("torch."), found.spec)
    store.open_for(made)
    return made


@contextmanager
def naming(name: str, refused: dict[str, str]) -> Iterator[None]:
    """Note what is wrong with one prompt of many under its name, and go on."""
    try:
        yield
    except FastPromptError as error:
        refused[name] = str(error)


def export_folder(store: PrefixStore, prompts: Path, compiler: Compiler) -> tuple[dict[str, Entry], dict[str, str]]:
    """Bring a store up to date with a folder of prompts: what its names stand for now, and what was refused, and why.

    Semantics: prompts that are there in the same version are left as they are; names whose prompts have gone, or are
    refused now, are removed.
    """
    from fastprompt.serving.registry import PromptRegistry

    registry = PromptRegistry(prompts, store.backbone().spec)
    entries: dict[str, Entry] = {}
    refused: dict[str, str] = {}
    for name in registry.names():
        with naming(name, refused):
            version = registry.current(name)
            entries[name] = _up_to_date(store, version) or export_prompt(
                store, name, registry.load(version), version, compiler
            )
    for name in store.names():
        if name not in entries:
            store.remove_name(name)
    store.collect()
    return entries, refused


def _up_to_date(store: PrefixStore, version: PromptVersion) -> Entry | None:
    """What the store has of a version already."""
    try:
        held = store.current(version.name)
    except FastPromptError:
        return None
    return held if held.version == version.version and store.has_prefix(held.digest) else None
