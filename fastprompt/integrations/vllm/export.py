"""Prompts made into prefixes that vLLM can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import (
    FastPromptError,
    PromptChangedError,
    PromptFileError,
    PromptNotFoundError,
    UnsupportedError,
)
from fastprompt.integrations.vllm.prefix_file import prefix_bytes
from fastprompt.integrations.vllm.store import Entry, PrefixStore, StoreBackbone
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.versions import PromptVersion
from fastprompt.spec import BackboneSpec, Prefix, unflatten

Compile = Callable[[Sequence[torch.Tensor]], Sequence[Prefix]]
_TRIES = 5  # looks at a prompt that others keep replacing


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


def export_prompt(store: PrefixStore, registry: PromptRegistry, name: str, compile: Compile) -> Entry:
    """Let a name stand in the store for what it stands for in a folder of prompts; the store's entry is removed where
    that is nothing, or nothing that vLLM's pages can hold.

    Semantics: a version that is there already is left as it is; one that is replaced meanwhile is looked at again.
    Errors: PromptNotFoundError; PromptFileError for a damaged prompt, or where the disk fails; UnsupportedError.
    """
    for _ in range(_TRIES):
        seen = _version(registry, name)
        check = while_stands(registry, name, seen)
        try:
            return _up_to_date(store, name, seen) or _export(store, registry, name, compile, check)
        except PromptChangedError:
            continue
        except FastPromptError:
            with suppress(PromptChangedError):
                store.remove_name(name, check)
            raise
    raise PromptChangedError(f"prompt {name!r} was replaced {_TRIES} times while it was exported: export it again")


def while_stands(registry: PromptRegistry, name: str, version: str | None) -> Callable[[], None]:
    """What raises PromptChangedError unless a name stands for this version in the folder, None for none that is
    intact; a write to the store goes with it that must not undo a later one."""

    def check() -> None:
        if _version(registry, name) != version:
            raise PromptChangedError(f"prompt {name!r} has changed since it was looked up: look it up again")

    return check


def _version(registry: PromptRegistry, name: str) -> str | None:
    try:
        return registry.current(name).version
    except FastPromptError:
        return None


def _up_to_date(store: PrefixStore, name: str, version: str | None) -> Entry | None:
    """What the store has of a version already."""
    try:
        held = store.current(name)
    except FastPromptError:
        return None
    return held if held.version == version and store.has_prefix(held.digest) else None


def _export(
    store: PrefixStore, registry: PromptRegistry, name: str, compile: Compile, check: Callable[[], None]
) -> Entry:
    version = registry.current(name)
    prompt = registry.load(version)
    check_prompt(name, prompt)
    entry = entry_of(version, store_prefix(store, to_prefix(prompt, store.backbone().spec, compile)))
    store.set_name(name, entry, check)
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
    if store.exists:
        return store.backbone()
    found = compiler.backbone
    check_backbone(found.spec)
    made = StoreBackbone(model, str(found.dtype).removeprefix("torch."), found.spec)
    store.open_for(made)
    return made


def export_prompts(
    store: PrefixStore, registry: PromptRegistry, names: Iterable[str], compile: Compile
) -> tuple[int, dict[str, str]]:
    """Export prompts by name: how many the store has of them now, and what was refused, and why."""
    there = 0
    refused: dict[str, str] = {}
    for name in names:
        try:
            export_prompt(store, registry, name, compile)
            there += 1
        except PromptNotFoundError:  # it has gone, also from the store
            continue
        except FastPromptError as error:
            refused[name] = str(error)
    return there, refused


def export_folder(store: PrefixStore, prompts: Path, compile: Compile) -> tuple[int, dict[str, str]]:
    """Bring a store up to date with a folder of prompts: names whose prompts have gone are removed.

    Returns what `export_prompts` does.
    """
    registry = PromptRegistry(prompts, store.backbone().spec)
    done = export_prompts(store, registry, sorted({*registry.names(), *store.names()}), compile)
    with suppress(PromptFileError):  # what nobody needs any more may stay: the store may be one that others write
        store.collect()
    return done
