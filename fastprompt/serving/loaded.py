"""Prompts of a registry inside a model, loaded when first asked for and forgotten when not used lately."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastprompt.errors import ArgumentError, BankFullError, PromptChangedError, PromptNotFoundError, UnsupportedError
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.host_copy import PromptCopy
from fastprompt.serving.host_tier import HostTier
from fastprompt.serving.loaded_pins import LoadedPins
from fastprompt.serving.tier_stats import LoadedStats

if TYPE_CHECKING:
    from fastprompt.serving.registry import PromptVersion

_TRIES = 3  # a prompt may be replaced between the look at its version and the reading


class PromptSource(Protocol):
    """What is needed of a `PromptRegistry`; files are read in a thread that does nothing else."""

    def __contains__(self, name: object) -> bool: ...

    def current(self, name: str) -> PromptVersion: ...

    def load(self, version: PromptVersion) -> SoftPrompt: ...


@dataclass(eq=False)
class Loaded:
    """One version of a prompt, in the model under `key` once `ready`, at least while it has `users`.

    A `stale` one leaves with its last user: its name stands for something else.
    """

    version: PromptVersion
    key: str
    ready: asyncio.Task[SoftPrompt]
    users: int = 0
    stale: bool = False

    @property
    def prompt(self) -> SoftPrompt:
        return self.ready.result()

    @property
    def outputs(self) -> int | None:
        """Outputs of the prompt's own head, None where the backbone's answers."""
        return None if self.prompt.head is None else self.prompt.head.outputs


class LoadedPrompts:
    """The versions in use, in `model.library` as "name@version"; least recently used ones go first.

    Semantics:
        loaded = await prompts.acquire("a")     # the registry's current version, pinned
        model(ids, prompts=[loaded.key])        # the same version, whatever happens to the name meanwhile
        prompts.release(loaded)
    All methods run on one event loop. `files` is the thread that reads; `add(key, prompt)` and `remove(key)` run on
    `thread`, which alone may touch the model. Where all versions are in use and another has no room, `acquire` waits.
    `check(version)` raises for one that is of no use here, before it is read. Copies of at most `host_bytes` stay in
    host memory, as they were or in 8 bits as `storage` says; then all get the rounded numbers, wherever they come from.
    """

    def __init__(
        self,
        registry: PromptSource,
        add: Callable[[str, SoftPrompt], None],
        remove: Callable[[str], object],
        *,
        files: Executor,
        thread: Executor,
        max_prompts: int,
        max_bytes: int,
        host_bytes: int = 0,
        storage: str = "model",
        check: Callable[[PromptVersion], object] = lambda version: None,
    ) -> None:
        self._registry, self._add, self._remove = registry, add, remove
        self._files, self._thread = files, thread
        self._max_prompts, self._max_bytes = max_prompts, max_bytes
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        self._host: HostTier[PromptCopy] = HostTier(host_bytes)
        self._copied: dict[str, str] = {}  # name -> the version that may be in host memory
        self._storage = storage
        self._room = asyncio.Event()
        self._check = check
        self._pins = LoadedPins(registry, self.acquire, self.release, max_prompts, max_bytes)
        self._hits = self._host_hits = self._loads = self._evictions = self._failures = 0

    def stats(self) -> LoadedStats:
        return LoadedStats(
            prompts=len(self._held),
            bytes=self._bytes(),
            max_prompts=self._max_prompts,
            max_bytes=self._max_bytes,
            hits=self._hits,
            loads=self._loads,
            evictions=self._evictions,
            failures=self._failures,
            host_prompts=len(self._host),
            host_bytes=self._host.bytes,
            host_hits=self._host_hits,
        )

    async def acquire(self, name: str) -> Loaded:
        """The current version of a prompt, in the model and kept there until it is released.

        Errors: PromptNotFoundError, PromptFileError, IncompatiblePromptError; UnsupportedError for virtual tokens in
        place; BankFullError for a prompt larger than the whole budget. Each request asks anew.
        """
        for _ in range(_TRIES):
            with suppress(PromptChangedError):
                return await self._pinned(await self.version(name))
        return await self._pinned(await self.version(name))

    def release(self, loaded: Loaded) -> None:
        """Let a version go; it stays in the model until the room is needed."""
        loaded.users -= 1
        if not loaded.users:
            if loaded.stale and self._held.get(loaded.key) is loaded and loaded.ready.done():
                self._evict(loaded)
            self._room.set()

    def names(self) -> frozenset[str]:
        """Names of the prompts that are in the model in some version."""
        return frozenset(loaded.version.name for loaded in self._held.values())

    def pin(self, name: str) -> None:
        """Load a prompt and keep it, and the versions that follow it, until it is unpinned or deleted.

        Errors: PromptNotFoundError, PromptFileError; BankFullError where pins would leave too little room for others.
        """
        self._pins.add(name)

    def unpin(self, name: str) -> None:
        """Undo `pin`. Errors: PromptNotFoundError for a name that is not pinned."""
        self._pins.remove(name)

    def pinned(self) -> dict[str, bool]:
        """Names that are pinned, and whether each is in the model by now."""
        return self._pins.names()

    def drop(self, name: str) -> None:
        """Note that a prompt was replaced or deleted: what nobody uses of it leaves the model."""
        self._forget(name, None)
        self._pins.renew(name)

    def unload(self, name: str) -> None:
        """Take a prompt out of the model, once nobody uses it; it comes back when it is next asked for.

        Errors: ArgumentError for a pinned one.
        """
        if name in self._pins:
            raise ArgumentError(f"prompt {name!r} is pinned: unpin it first")
        self._forget(name, None)

    def tier(self, version: str) -> str:
        """Where a version is: "device", "host" or "disk"; may be asked from any thread, as `pinned`."""
        if any(v.version.version == version for v in list(self._held.values())):
            return "device"
        return "host" if version in self._host else "disk"

    async def version(self, name: str) -> PromptVersion:
        """The registry's current version of a prompt."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._files, self._registry.current, name)
        except PromptNotFoundError:
            self._forget(name, None)
            raise

    async def _pinned(self, version: PromptVersion) -> Loaded:
        key = f"{version.name}@{version.version}"
        while (held := self._held.get(key)) is None:
            self._check_size(version)
            self._check(version)
            self._forget(version.name, key)
            self._pins.renew(version.name)
            if self._make_room(version.bytes):
                ready = asyncio.get_running_loop().create_task(self._load(key, version))
                ready.add_done_callback(lambda task: task.cancelled() or task.exception())  # if nobody waits for it
                held = self._held[key] = Loaded(version, key, ready)
                break
            self._room.clear()
            await self._room.wait()
        else:
            self._hits += 1
        held.users += 1
        held.stale = False
        self._held.move_to_end(key)
        try:
            await asyncio.shield(held.ready)
        except BaseException:
            self.release(held)
            raise
        return held

    async def _load(self, key: str, version: PromptVersion) -> SoftPrompt:
        loop = asyncio.get_running_loop()
        known = self._host.get(version.version)
        try:
            prompt, copy = await loop.run_in_executor(self._files, self._read, version, known)
            await loop.run_in_executor(self._thread, self._add, key, prompt)
        except BaseException:
            del self._held[key]
            self._failures += 1
            self._room.set()
            raise
        self._loads += known is None
        self._host_hits += known is not None
        if not self._held[key].stale:
            self._host.put(version.version, copy)
            self._copied[version.name] = version.version
        self._room.set()  # nobody may want it any more
        return prompt

    def _read(self, version: PromptVersion, copy: PromptCopy | None) -> tuple[SoftPrompt, PromptCopy]:
        """What the files' thread does: a prompt for the model, from its copy or from disk, and its copy."""
        if copy is None:
            prompt = self._registry.load(version)
            if prompt.in_place:
                raise UnsupportedError(
                    f"prompt {version.name!r} has its virtual tokens in place, at ids that a client's text cannot "
                    "hold: serve one that stands in front of the text"
                )
            copy = PromptCopy.of(prompt, self._storage)
        return copy.prompt(), copy

    def _check_size(self, version: PromptVersion) -> None:
        if version.bytes > self._max_bytes:
            raise BankFullError(
                f"prompt {version.name!r} has {version.bytes} bytes, all loaded prompts together may have "
                f"{self._max_bytes}: raise the budget"
            )

    def _make_room(self, bytes: int) -> bool:
        """Evict until a prompt of this size fits; False if versions in use are in the way."""
        idle = [loaded for loaded in self._held.values() if not loaded.users and loaded.ready.done()]
        for loaded in idle:
            if self._fits(bytes):
                break
            self._evict(loaded)
        return self._fits(bytes)

    def _fits(self, bytes: int) -> bool:
        return len(self._held) < self._max_prompts and self._bytes() + bytes <= self._max_bytes

    def _bytes(self) -> int:
        return sum(loaded.version.bytes for loaded in self._held.values())

    def _forget(self, name: str, key: str | None) -> None:
        """Evict versions of a name other than `key`, now or with their last user: nobody will ask for them again."""
        copied = self._copied.get(name)
        if copied is not None and f"{name}@{copied}" != key:
            self._host.discard(self._copied.pop(name))
        for loaded in list(self._held.values()):
            if loaded.version.name != name or loaded.key == key:
                continue
            if loaded.users or not loaded.ready.done():
                loaded.stale = True
            else:
                self._evict(loaded)

    def _evict(self, loaded: Loaded) -> None:
        del self._held[loaded.key]
        self._evictions += 1
        self._thread.submit(self._remove, loaded.key)  # behind any batch that reads it
