"""The way of prompts from disk through host memory into the device's memory, where attention reads them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastprompt.batch import Extent
from fastprompt.errors import ArgumentError, BankFullError, PromptNotFoundError
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.library import bank_for
from fastprompt.serving.host_copy import STORAGES, HostCopy
from fastprompt.serving.host_tier import HostTier
from fastprompt.serving.pins import Pins
from fastprompt.serving.pipeline import Pipeline
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.tier_stats import Counts, DiskStats, ResidencyStats, TierStats
from fastprompt.serving.versions import PromptVersion

HOST_BYTES = 1 << 30


@dataclass(eq=False)
class Lease:
    """A version of a prompt that stays where it is on the device until released, whatever happens to its name."""

    version: PromptVersion
    extent: Extent
    _let_go: Callable[[], object] = field(repr=False)
    _held: bool = True

    def release(self) -> None:
        """Let it go; a second time does nothing."""
        if self._held:
            self._held = False
            self._let_go()


class Residency:
    """Which prompts are in the device's memory and in the host's, and how others get there.

    Semantics:
        device   a `PromptBank` of `device_bytes` (None: grows without bound), in the backbone's dtype
        host     `HostCopy`s of at most `host_bytes`, as on the device or, with `storage` "int8" or "fp8", in 8 bits
        disk     the registry's folders, read by `loaders` threads while rows run
    Both upper tiers let the least recently used go that is not in use, and are keyed by version, not by name: equal
    contents are held once, and a name that is replaced, removed or made again never finds what it stood for before.
    With 8 bits the device always gets the rounded numbers, so that answers do not depend on where a prompt came from.

    `acquire`, `progress` and `arenas` run in the engine's thread; `Lease.release`, `pin`, `unpin`, `pinned`, `drop`,
    `unload`, `tier` and `stats` in any. `on_ready`, if set, is called from some thread when `progress` has work.
    """

    def __init__(
        self,
        backbone: Backbone,
        registry: PromptRegistry,
        *,
        device_bytes: int | None = None,
        host_bytes: int = HOST_BYTES,
        storage: str = "model",
        loaders: int = 1,
    ) -> None:
        if storage not in STORAGES:
            raise ArgumentError(f"storage is {storage!r}, expected one of {', '.join(STORAGES)}")
        if loaders < 1:
            raise ArgumentError(f"loaders is {loaders}, expected at least 1")
        self.registry = registry
        self.on_ready: Callable[[], None] | None = None
        self._backbone = backbone
        self.bank = bank_for(backbone, ("decoder",), device_bytes)
        self.crowded = False  # whether the last `acquire` found no room beside prompts in use
        self._capacity = None if device_bytes is None else self.bank.stats().capacity
        self._sites = range(len(backbone.spec.sites))
        self._arenas: tuple[int, list[torch.Tensor], list[torch.Tensor]] | None = None
        self._counts = Counts()
        self._host: HostTier[HostCopy] = HostTier(host_bytes)
        self._versions: dict[str, str] = {}  # name -> the version it was last seen to stand for
        self._names: Counter[str] = Counter()  # version -> how many names stand for it
        self._dropped: deque[str] = deque()
        self._unloaded: deque[str] = deque()
        self._pins = Pins(registry, self.acquire, self._capacity)
        self._pipeline = Pipeline(
            backbone,
            registry,
            storage=storage,
            threads=loaders,
            wake=self._wake,
            spare=self._host.put,
            counts=self._counts,
        )

    def acquire(self, name: str) -> Lease | None:
        """The current version of a prompt, on the device until the lease is released.

        None while it is on its way, or while prompts in use leave no room (`crowded` is true then): ask again after a
        later `progress`.
        Errors: PromptNotFoundError; PromptFileError, IncompatiblePromptError; UnsupportedError for virtual tokens in
        place and prompts of encoders; BankFullError for a prompt that will never fit. The next call tries anew.
        """
        self._forget_dropped()
        self.crowded = False
        version = self._current(name)
        if version.version in self.bank:
            self._counts.device_hits += 1
            return self._lease(version)
        if self._capacity is not None and version.length > self._capacity:
            raise BankFullError(
                f"prompt {name!r} has {version.length} tokens, the device's memory for prompts {self._capacity}: "
                "give it more bytes, or store a shorter prompt"
            )
        copy = self._host.get(version.version)
        read = copy is None
        if copy is None:
            copy = self._pipeline.ask(version)
        if copy is None or not self._promote(version, copy):
            return None
        if read:
            self._pipeline.claim(version.version)
            self._host.put(version.version, copy)
            self._counts.host_misses += 1
        else:
            self._counts.host_hits += 1
        return self._lease(version)

    def progress(self) -> bool:
        """Take what the loaders have read one step further; whether an `acquire` that waits should try again."""
        self._forget_dropped()
        finished = self._pipeline.advance()
        self._pins.renew()
        return finished

    def arenas(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of every site, `[Hkv, T, D]` and `[Hkv, T, Dv]`; to be asked for anew in each step."""
        generation = self.bank.generation
        if self._arenas is None or self._arenas[0] != generation:
            keys, values = ([arena(i) for i in self._sites] for arena in (self.bank.keys, self.bank.values))
            self._arenas = generation, keys, values
        return self._arenas[1], self._arenas[2]

    def pin(self, name: str) -> None:
        """Bring a prompt to the device and keep it there, also when it is replaced.

        Errors: PromptNotFoundError, PromptFileError; BankFullError where pins would take most of the device.
        """
        self._pins.add(name)
        self._wake()

    def unpin(self, name: str) -> None:
        """Undo `pin`. Errors: PromptNotFoundError for a name that is not pinned."""
        self._pins.remove(name)

    def pinned(self) -> dict[str, bool]:
        """Names that are pinned, and whether each is on the device by now."""
        return self._pins.names()

    @property
    def waits(self) -> bool:
        """Whether a pinned prompt is not on the device as its name stands now: `progress` has to be called for it."""
        return self._pins.waits

    def drop(self, name: str) -> None:
        """Note that a prompt was replaced or deleted: its old version leaves memory once no lease holds it."""
        self._dropped.append(name)
        self._wake()

    def unload(self, name: str) -> None:
        """Take a prompt out of memory; rows that read it finish, and it comes back when it is next asked for.

        Errors: ArgumentError for a pinned one.
        """
        if name in self._pins.names():
            raise ArgumentError(f"prompt {name!r} is pinned: unpin it first")
        self._unloaded.append(name)
        self._wake()

    def on_device(self, name: str) -> bool:
        """Whether the version that a name was last seen to stand for is on the device."""
        return self._versions.get(name, "") in self.bank

    def tier(self, version: str) -> str:
        """The uppermost tier that holds a version: "device", "host" or "disk"."""
        return "device" if version in self.bank else "host" if version in self._host else "disk"

    def stats(self) -> ResidencyStats:
        """Counts and sizes of this moment."""
        bank, counts = self.bank.stats(), self._counts
        return ResidencyStats(
            device=TierStats(
                prompts=bank.prompts,
                bytes=bank.bytes,
                budget=bank.budget,
                hits=counts.device_hits,
                misses=counts.promotions,
                promotions=counts.promotions,
                evictions=bank.evictions,
            ),
            host=TierStats(
                prompts=len(self._host),
                bytes=self._host.bytes,
                budget=self._host.budget,
                hits=counts.host_hits,
                misses=counts.host_misses,
                promotions=counts.host_misses,
                evictions=self._host.evictions,
            ),
            disk=DiskStats(
                prompts=len(self.registry),
                loads=counts.loads,
                bytes=counts.bytes_read,
                failures=counts.failures,
                seconds=counts.read_seconds,
                compile_seconds=counts.compile_seconds,
            ),
            loading=len(self._pipeline),
            pinned=len(self._pins.names()),
            leased=bank.pinned,
        )

    def close(self) -> None:
        """End the loaders' threads."""
        self._pipeline.close()

    def _wake(self) -> None:
        if self.on_ready is not None:
            self.on_ready()

    def _current(self, name: str) -> PromptVersion:
        try:
            version = self.registry.current(name)
        except PromptNotFoundError:
            self._stands_for(name, None)
            raise
        if self._versions.get(name) != version.version:
            self._stands_for(name, version.version)
        return version

    def _lease(self, version: PromptVersion) -> Lease:
        pin = self.bank.pin((version.version,))
        entry = pin.__enter__()[0]
        extent = Extent(entry.start, entry.length, entry.layers, entry.length)
        return Lease(version, extent, lambda: pin.__exit__(None, None, None))

    def _promote(self, version: PromptVersion, copy: HostCopy) -> bool:
        """Write a copy to the device; False if prompts in use leave no room for it now."""
        try:
            self.bank.put(version.version, copy.prefix(self._backbone.layer_devices), version.version)
        except BankFullError as error:
            if self.bank.stats().pinned > len(self._pins.starts()):
                self.crowded = True
                return False
            raise BankFullError(f"prompt {version.name!r} does not fit beside the pinned ones: {error}") from None
        self._counts.promotions += 1
        return True

    def _forget_dropped(self) -> None:
        while self._dropped:
            name = self._dropped.popleft()
            self._pipeline.forgive(name)
            try:
                self._current(name)
            except Exception:  # whoever asks for it next is told why
                self._stands_for(name, None)
        while self._unloaded:
            self._discard(self._versions.get(self._unloaded.popleft(), ""))

    def _discard(self, version: str) -> None:
        """Forget what memory holds of a version, the device's copy once no lease holds it."""
        self._host.discard(version)
        if version in self.bank:
            self.bank.remove(version)

    def _stands_for(self, name: str, version: str | None) -> None:
        """Note what a name stands for now, and forget what no name stands for any more."""
        old = self._versions.pop(name, None)
        if version is not None:
            self._versions[name] = version
            self._names[version] += 1
        if old is None:
            return
        self._names[old] -= 1
        if not self._names[old]:
            del self._names[old]
            self._pipeline.drop(old)
            self._discard(old)
