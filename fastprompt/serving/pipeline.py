"""Prompts between disk and device: read by threads, compiled by the engine's thread, kept until claimed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import torch

from fastprompt.arena import ArenaShape
from fastprompt.errors import ArgumentError, FastPromptError, PromptChangedError, PromptFileError, UnsupportedError
from fastprompt.integrations.transformers.backbone import Backbone, evaluating
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.host_copy import HostCopy
from fastprompt.serving.loader import Loader
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.tier_stats import Counts
from fastprompt.serving.versions import PromptVersion
from fastprompt.spec import Prefix, unflatten

MOST = 16  # prompts under way or unclaimed at a time
PATIENCE = 1.0  # seconds after which nobody is taken to wait for a prompt any more
COMPILED_TOKENS = 512  # virtual tokens compiled before rows get their turn
_ERRORS = 256  # errors kept for whoever asks


class Pipeline:
    """Brings versions from disk to `HostCopy`s, alike whatever else is under way.

    Semantics:
        ask(version)     the finished copy; else None, and it is on its way. Raises what it failed with, once
        claim(version)   the copy is somebody else's now
        forgive(name)    what reading a name's files failed with before now is nobody's concern: they were stored anew
        advance()        compiles what was read; True if something finished or failed
    An embedding prompt is compiled by itself, so that its numbers depend on nothing but its weights. At most `MOST`
    prompts are under way or unclaimed: beyond that none is started. Copies that nobody asked for in `PATIENCE` seconds
    go to `spare`. All methods run in the engine's thread; `wake` is called, from any, when `advance` has work.
    """

    def __init__(
        self,
        backbone: Backbone,
        registry: PromptRegistry,
        *,
        storage: str,
        threads: int,
        wake: Callable[[], None],
        spare: Callable[[str, HostCopy], None],
        counts: Counts,
    ) -> None:
        self._backbone, self._registry = backbone, registry
        self._shape = ArenaShape.build(backbone.spec.layers, "cpu", backbone.dtype)
        self._storage, self._pinned = storage, backbone.device.type == "cuda"
        self._wake, self._spare, self._counts = wake, spare, counts
        self._loader: Loader[HostCopy | torch.Tensor] = Loader(self._read, threads, wake)
        self._dropped: set[str] = set()  # versions being read that nobody wants any more
        self._uncompiled: OrderedDict[str, tuple[PromptVersion, torch.Tensor]] = OrderedDict()
        self._ready: dict[str, tuple[HostCopy, float]] = {}  # and when it was last asked for
        self._failed: OrderedDict[tuple[str, str], FastPromptError] = OrderedDict()  # by name and version
        self._forgiven: dict[str, float] = {}  # when a name was, while something is being read

    def __len__(self) -> int:
        """Prompts under way or unclaimed."""
        return len(self._loader) + len(self._uncompiled) + len(self._ready)

    def ask(self, version: PromptVersion) -> HostCopy | None:
        key = version.version
        error = self._failed.pop((version.name, key), None)
        if error is not None:
            raise error
        self._dropped.discard(key)
        if key in self._ready:
            copy = self._ready[key][0]
            self._ready[key] = copy, time.monotonic()
            return copy
        if key not in self._loader and key not in self._uncompiled:
            self._let_go()
            if len(self) < MOST:
                self._loader.start(version)
        return None

    def claim(self, key: str) -> None:
        del self._ready[key]

    def drop(self, key: str) -> None:
        """Forget a version, wherever it is."""
        self._ready.pop(key, None)
        self._uncompiled.pop(key, None)
        if key in self._loader:
            self._dropped.add(key)

    def forgive(self, name: str) -> None:
        for key in [key for key in self._failed if key[0] == name]:
            del self._failed[key]
        if len(self._loader):
            self._forgiven[name] = time.perf_counter()

    def advance(self) -> bool:
        finished = False
        for loaded in self._loader.take():
            version, key = loaded.version, loaded.version.version
            self._counts.loads += 1
            self._counts.read_seconds += loaded.seconds
            wanted = key not in self._dropped
            self._dropped.discard(key)
            if loaded.error is not None:
                finished = True
                if loaded.begin > self._forgiven.get(version.name, 0.0):
                    self._fail(version, loaded.error)
                continue
            self._counts.bytes_read += version.bytes
            if not wanted:
                continue
            if isinstance(loaded.content, HostCopy):
                finished = True
                self._ready[key] = loaded.content, time.monotonic()
            elif loaded.content is not None:
                self._uncompiled[key] = version, loaded.content
        if not len(self._loader):
            self._forgiven.clear()
        return self._compile() or finished

    def close(self) -> None:
        """End the threads."""
        self._loader.close()

    def _read(self, version: PromptVersion) -> HostCopy | torch.Tensor:
        """What a thread of the loader does: the prefix, or an embedding prompt's weights `[P, E]`."""
        prompt = self._registry.load(version)
        self._check(version.name, prompt)
        weights = prompt.weights()
        if prompt.kind == "embedding":
            return weights
        return self._pack(version.name, unflatten(weights, prompt.spec, prompt.config.prefix_layers(prompt.spec)))

    def _check(self, name: str, prompt: SoftPrompt) -> None:
        """Raise UnsupportedError for a prompt that no row can read from an arena."""
        spec, why = self._backbone.spec, ""
        if prompt.in_place:
            why = "has virtual tokens among the text's own"
        elif any(site >= spec.num_layers for site in prompt.config.prefix_layers(spec)):
            why = "enters an encoder or cross-attention"
        elif prompt.kind == "embedding" and not self._backbone.compiles:
            why = f"is an embedding prompt, which {spec.describe()} cannot turn into a prefix"
        if why:
            raise UnsupportedError(f"prompt {name!r} {why}: it cannot be served this way, use PromptedModel")

    def _pack(self, name: str, prefix: Prefix) -> HostCopy:
        try:
            return HostCopy.pack(self._shape.stage(name, prefix), self._storage, pinned=self._pinned)
        except ArgumentError as error:
            raise PromptFileError(str(error)) from None

    def _compile(self) -> bool:
        """Compile what waits for it, up to `COMPILED_TOKENS`."""
        tokens = 0
        while self._uncompiled and tokens < COMPILED_TOKENS:
            key, (version, weights) = self._uncompiled.popitem(last=False)
            tokens += len(weights)
            begin = time.perf_counter()
            try:
                with torch.no_grad(), evaluating(self._backbone.model):
                    prefix = self._backbone.compile([weights])[0]
                self._ready[key] = self._pack(version.name, prefix), time.monotonic()
            except FastPromptError as error:
                self._fail(version, error)
            except Exception as error:  # whatever a backbone raises concerns this prompt alone
                self._fail(version, PromptFileError(f"prompt {version.name!r} could not be compiled: {error!r}"))
            self._counts.compile_seconds += time.perf_counter() - begin
        if self._uncompiled:
            self._wake()
        return tokens > 0

    def _fail(self, version: PromptVersion, error: FastPromptError) -> None:
        if isinstance(error, PromptChangedError):  # whoever asks next asks for another version
            return
        self._counts.failures += 1
        self._failed[version.name, version.version] = error
        if len(self._failed) > _ERRORS:
            self._failed.popitem(last=False)

    def _let_go(self) -> None:
        """Give up copies whose rows have gone away."""
        oldest = time.monotonic() - PATIENCE
        for key in [key for key, (_, asked) in self._ready.items() if asked < oldest]:
            self._spare(key, self._ready.pop(key)[0])
