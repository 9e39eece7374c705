"""The workers' half of the connector: prefixes written into vLLM's pages by its attention backends' own functions."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastprompt.errors import FastPromptError, PromptFileError, UnsupportedError
from fastprompt.integrations.vllm.loads import Load
from fastprompt.integrations.vllm.prefix_file import MappedPrefix
from fastprompt.integrations.vllm.store import PrefixStore
from fastprompt.spec import BackboneSpec

log = logging.getLogger("fastprompt.vllm")

_MAPPED = 4096  # prefixes kept mapped and checked


@dataclass
class LoadStats:
    """Counts since the start: loads of a prefix or of its tail, tokens written, files mapped, loads that failed."""

    loads: int = 0
    tokens: int = 0
    mapped: int = 0
    failed: int = 0
    seconds: float = 0.0


class Prefixes:
    """Prefix files of a store for one backbone, mapped when first read; least recently used ones are let go."""

    def __init__(self, store: PrefixStore, spec: BackboneSpec, capacity: int = _MAPPED) -> None:
        self._store, self._spec, self._capacity = store, spec, capacity
        self._held: OrderedDict[str, MappedPrefix] = OrderedDict()
        self._lock = threading.Lock()
        self.mapped = 0

    def __len__(self) -> int:
        return len(self._held)

    def get(self, digest: str) -> MappedPrefix:
        """A prefix, checked whole, its file unchanged since. Errors: PromptFileError."""
        with self._lock:
            held = self._held.pop(digest, None)
            if held is None or not held.unchanged:
                held = self._fitting(self._store.map(digest))
                self.mapped += 1
            self._held[digest] = held
            if len(self._held) > self._capacity:
                self._held.popitem(last=False)
            return held

    def _fitting(self, prefix: MappedPrefix) -> MappedPrefix:
        """A prefix, if it is for this backbone: the store may have become another one's since the engine started."""
        layers, layer = self._spec.num_layers, self._spec.layers[0]
        for side, dim in ((prefix.keys, layer.key_dim), (prefix.values, layer.value_dim)):
            wanted = (layers, prefix.length, layer.kv_heads, dim)
            if side.shape != wanted:
                raise PromptFileError(
                    f"{prefix.path} holds {tuple(side.shape)}, this backbone's prefixes are {wanted}: export the "
                    "prompt for this backbone"
                )
        return prefix


class PageWriter:
    """Writes prefixes into the pages of the layers that this worker runs.

    Semantics, of each layer with its number i and this rank's heads:
        slots = blocks[position // block_size] * block_size + position % block_size
        layer.impl.do_kv_cache_update(layer, keys[i, start:stop, heads], values[i, start:stop, heads], pages, slots)
    """

    def __init__(
        self,
        prefixes: Prefixes,
        layers: Mapping[str, int],
        heads: slice,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.prefixes, self.layers, self.heads = prefixes, dict(layers), heads
        self.block_size, self.dtype = block_size, dtype
        self.stats = LoadStats()

    def write(self, loads: Sequence[Load], modules: Mapping[str, Any]) -> set[int]:
        """Carry out loads; the pages of those that failed. Raises nothing: that would end the engine for everybody."""
        begin = time.perf_counter()
        found, failed = self._find(loads)
        try:
            if found:
                self._write(found, modules)
        except Exception as error:  # whatever a backend does with its pages
            log.exception("prefixes could not be written into pages: %r", error)
            failed += [load for load, _ in found]
        self.stats.loads += len(loads)
        self.stats.failed += len(failed)
        self.stats.tokens += sum(load.stop - load.start for load in loads)
        self.stats.mapped = self.prefixes.mapped
        self.stats.seconds += time.perf_counter() - begin
        return {block for load in failed for block in load.touched(self.block_size)}

    def _find(self, loads: Sequence[Load]) -> tuple[list[tuple[Load, MappedPrefix]], list[Load]]:
        found, failed = [], []
        for load in loads:
            try:
                if load.ticket is None:
                    raise PromptFileError(load.problem)
                prefix = self.prefixes.get(load.ticket.digest)
                if prefix.length != load.ticket.length:
                    raise PromptFileError(
                        f"{prefix.path} has {prefix.length} virtual tokens, the request says {load.ticket.length}"
                    )
                found.append((load, prefix))
            except FastPromptError as error:
                log.error("a request fails: %s", error)
                failed.append(load)
            except Exception as error:  # memory, a file system's mishap
                log.exception("a request fails, its prefix could not be read: %r", error)
                failed.append(load)
        return found, failed

    def _write(self, found: Sequence[tuple[Load, MappedPrefix]], modules: Mapping[str, Any]) -> None:
        slots = torch.cat([load.slots(self.block_size) for load, _ in found])
        for name, number in self.layers.items():
            layer = modules[name]
            pages = layer.kv_cache
            keys, values = (
                torch.cat([side(prefix)[number, load.start : load.stop, self.heads] for load, prefix in found])
                for side in (lambda p: p.keys, lambda p: p.values)
            )
            to = {"device": pages.device, "dtype": self.dtype}
            layer.impl.do_kv_cache_update(layer, keys.to(**to), values.to(**to), pages, slots.to(pages.device))


def heads_of_rank(kv_heads: int, ranks: int, rank: int) -> slice:
    """The heads that a tensor-parallel rank holds: an equal share, or one that several ranks hold."""
    if kv_heads >= ranks:
        share = kv_heads // ranks
        return slice(rank * share, (rank + 1) * share)
    head = rank * kv_heads // ranks
    return slice(head, head + 1)


def check_layers(modules: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UnsupportedError unless prefixes can be written into the pages of these layers from outside."""
    for name in names:
        impl = getattr(modules.get(name), "impl", None)
        backend = getattr(modules.get(name), "attn_backend", None)
        if impl is not None and getattr(backend, "forward_includes_kv_cache_update", True):
            raise UnsupportedError(
                f"attention backend {type(impl).__name__} writes its pages only while it attends: choose another one "
                "with --attention-backend"
            )
