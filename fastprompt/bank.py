"""Many prompts' prefixes, stored once each, in memory that attention reads in place."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fastprompt.arena import Arena, ArenaShape
from fastprompt.errors import ArgumentError, BankFullError, DuplicatePromptError, PromptNotFoundError
from fastprompt.extents import Extents, Room, Rooms
from fastprompt.records import Entry, Record, Records
from fastprompt.spec import LayerShape, Prefix

__all__ = ["MAX_TOKENS", "BankStats", "Entry", "PromptBank"]

MAX_TOKENS = 2**31 - 1  # the ops take token numbers as int32
_FIRST_TOKENS = 256  # capacity of an unbounded bank at its first prompt


@dataclass(frozen=True)
class BankStats:
    """A bank at one moment. Tokens count in all layers together; `retired` versions wait for their last pin."""

    prompts: int
    pinned: int
    retired: int
    tokens: int
    capacity: int
    largest_free: int
    token_bytes: int
    budget: int | None
    hits: int
    misses: int
    evictions: int
    compactions: int
    generation: int

    @property
    def bytes(self) -> int:
        """Bytes of the tokens in use."""
        return self.tokens * self.token_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the arena; never above `budget`."""
        return self.capacity * self.token_bytes


class PromptBank:
    """Prefixes of many prompts in one ragged arena `[L, 2, Hkv, T, D]`, found by name.

    Semantics:
        put / replace / remove   all or nothing: an error leaves names, versions, data and order of use as they were
        pin(names)               entries that stay in place, unchanged, until released, whatever happens to the names
        room for P tokens        first hole that fits; else slide entries together between pinned extents;
                                 else grow (no budget) or evict the least recently used unpinned prompts (budget)
        keys(l), values(l)       the arena of layer l: `keys(l)[:, e.start : e.start + e.length]` are entry e's keys

    `layers` gives each layer's geometry, `devices` one device for all layers or one a layer, `dtype` the storage
    type (prompts are converted on the way in), `bytes` the budget. The budget counts the arena's capacity on all
    devices together. With one, the arena is allocated at once, as large as the budget allows, and never again; it
    is then never exceeded, and sliding moves data inside it. Without one, capacity doubles: growing holds the old
    and the new arena for a moment, and views of the old one keep their data. A prompt on some layers only leaves
    its tokens in the other layers unused; nothing reads them.

    Reading without a pin is unsafe as soon as anybody writes: an entry's tokens may move or be overwritten. Hold a
    pin until the reading work is done, or, on a GPU, queued on the stream that writes to the bank.
    All methods may be called from any thread.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        dtype: torch.dtype = torch.float32,
        devices: torch.device | str | Sequence[torch.device | str] = "cpu",
        bytes: int | None = None,
    ) -> None:
        shape = ArenaShape.build(layers, devices, dtype)
        tokens = 0
        if bytes is not None and shape.token_bytes:
            tokens = min(bytes // shape.token_bytes, MAX_TOKENS)
            if tokens < 1:
                raise ArgumentError(
                    f"bytes={bytes} holds no token, expected at least {shape.token_bytes} (one token, all layers)"
                )
        self._budget = bytes
        self._lock = threading.RLock()
        self._arena = Arena(shape, tokens)
        self._extents = Extents(tokens)
        self._records = Records()
        self._hits = self._misses = self._evictions = self._compactions = self._generation = 0

    @property
    def generation(self) -> int:
        """Number of times the arena was reallocated: cached `keys(l)` are stale once it changes."""
        return self._generation

    def keys(self, layer: int) -> torch.Tensor:
        """The layer's current key arena `[Hkv, T, D]`, a view."""
        return self._arena.keys[layer]

    def values(self, layer: int) -> torch.Tensor:
        """The layer's current value arena `[Hkv, T, Dv]`, a view."""
        return self._arena.values[layer]

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def names(self) -> tuple[str, ...]:
        """Names held, least recently used first."""
        with self._lock:
            return self._records.names()

    def put(self, name: str, prefix: Prefix, version: str) -> Entry:
        """Store a prefix under a new name.

        Raises ArgumentError for a prefix that does not fit the bank's layers or is not finite in its dtype,
        DuplicatePromptError for a name in use, BankFullError where even eviction makes no room.
        """
        staged = self._stage(name, prefix)
        with self._lock:
            if name in self._records:
                raise DuplicatePromptError(f"name {name!r} is in the bank already; use replace, or remove it first")
            return self._insert(name, staged, version, None)

    def replace(self, name: str, prefix: Prefix, version: str) -> Entry:
        """Point an existing name at a new prefix; readers who pinned the old version keep it. Raises as `put`."""
        staged = self._stage(name, prefix)
        with self._lock:
            return self._insert(name, staged, version, self._records.find(name))

    def remove(self, name: str) -> None:
        """Forget a name; its tokens are free at once, or when the last pin is released."""
        with self._lock:
            self._discard(self._records.find(name))

    def get(self, name: str) -> Entry:
        """The entry of a name, now the most recently used one. Raises PromptNotFoundError."""
        with self._lock:
            try:
                entry = self._records.find(name).entry
            except PromptNotFoundError:
                self._misses += 1
                raise
            self._hits += 1
            self._records.use(name)
            return entry

    @contextmanager
    def pin(self, names: Iterable[str]) -> Iterator[tuple[Entry, ...]]:
        """Entries of `names` (repeats allowed), which neither move nor change inside the `with` block."""
        names = tuple(names)
        with self._lock:
            entries = tuple(self.get(name) for name in names)
            records = [self._records.find(entry.name) for entry in entries]
            for record in records:
                self._records.pin(record)
        try:
            yield entries
        finally:
            with self._lock:
                for record in records:
                    if self._records.unpin(record):
                        self._release(record)

    def stats(self) -> BankStats:
        """Counts and sizes, all of the same moment."""
        with self._lock:
            return BankStats(
                prompts=len(self._records),
                pinned=len(self._records.pinned),
                retired=self._records.retired,
                tokens=self._extents.used,
                capacity=self._arena.tokens,
                largest_free=self._extents.largest,
                token_bytes=self._arena.shape.token_bytes,
                budget=self._budget,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                compactions=self._compactions,
                generation=self._generation,
            )

    def _stage(self, name: str, prefix: Prefix) -> Prefix:
        """The prefix as it will be stored, checked; sliding must not move what it reads, so a view is copied."""
        arena = self._arena
        return arena.shape.stage(name, prefix).map(lambda t: t.clone() if arena.owns(t) else t)

    # Everything below runs under the lock.

    def _insert(self, name: str, prefix: Prefix, version: str, old: Record | None) -> Entry:
        start = self._make_room(name, prefix.length, old)
        self._arena.write(start, prefix)
        self._extents.take(start, prefix.length)
        if old is not None and self._records.is_live(old):
            self._discard(old)
        entry = Entry(name, version, start, prefix.length, prefix.layers)
        self._records.add(entry)
        return entry

    def _discard(self, record: Record) -> None:
        """Take a version's name away, and its tokens unless somebody still reads them."""
        if self._records.remove(record):
            self._release(record)

    def _release(self, record: Record) -> None:
        self._extents.release(record.entry.start, record.entry.length)

    def _make_room(self, name: str, length: int, old: Record | None) -> int:
        """Start of a hole of `length` tokens, made by sliding, growing or evicting; `old` may go as it is replaced."""
        start = self._extents.find(length)
        if start is not None:
            return start
        room, victims, available = self._plan_room(length, old)
        if room is None and self._budget is None and self._arena.shape.token_bytes:
            return self._grow(name, length)
        if room is None:
            size = self._arena.shape.token_bytes
            raise BankFullError(
                f"prompt {name!r} needs {length * size} bytes ({length} tokens) in one piece, at most "
                f"{available * size} of {self._arena.nbytes} can be freed around {len(self._records.pinned)} pinned "
                "prompts; raise the bank's bytes, or release pins first"
            )
        for victim in victims:
            self._discard(victim)
            self._evictions += victim is not old
        start = self._extents.find(length)
        return self._slide(room, length) if start is None else start

    def _plan_room(self, length: int, old: Record | None) -> tuple[Room | None, list[Record], int]:
        """The first room that could hold `length` tokens, who must leave it, and the most tokens a room could free.

        Changes nothing. Leaves out victims whose going would not help: those in other rooms.
        """
        rooms = Rooms(self._extents, [(r.entry.start, r.entry.length) for r in self._records.pinned])
        best = max(rooms, key=lambda room: room.free)
        if best.free >= length:
            return best, [], best.free
        victims: dict[Room, list[Record]] = {room: [] for room in rooms}
        for victim in self._candidates(old):
            room = rooms.at(victim.entry.start)
            room.free += victim.entry.length
            victims[room].append(victim)
            if room.free >= length:
                return room, victims[room], room.free
        return None, [], max(room.free for room in rooms)

    def _candidates(self, old: Record | None) -> Iterator[Record]:
        """Who may leave, in order: the version being replaced, and, with a budget, the least recently used."""
        if old is not None and not old.pins:
            yield old
        if self._budget is not None:
            yield from (record for record in self._records if record is not old and not record.pins)

    def _slide(self, room: Room, length: int) -> int:
        """Move a room's entries down, each past the holes before it, until a hole of `length` tokens opens."""
        inside = [r for r in self._records if room.low <= r.entry.start < room.high]
        cursor = room.low
        for record in sorted(inside, key=lambda r: r.entry.start):
            entry = record.entry
            if entry.start - cursor >= length:
                break
            if entry.start > cursor:
                self._arena.move(entry.start, cursor, entry.length, entry.layers)
                self._extents.release(entry.start, entry.length)
                self._extents.take(cursor, entry.length)
                record.entry = replace(entry, start=cursor)
            cursor += entry.length
        self._compactions += 1
        return cursor

    def _grow(self, name: str, length: int) -> int:
        """Reallocate the arena with room for `length` tokens at its end."""
        needed = self._extents.capacity - self._extents.tail + length
        if needed > MAX_TOKENS:
            raise BankFullError(f"prompt {name!r} needs {needed} tokens of arena, at most {MAX_TOKENS} are addressable")
        tokens = min(max(needed, 2 * self._extents.capacity, _FIRST_TOKENS), MAX_TOKENS)
        self._arena = self._arena.grown(tokens)
        self._generation += 1
        start = self._extents.capacity - self._extents.tail
        self._extents.grow(tokens)
        return start
