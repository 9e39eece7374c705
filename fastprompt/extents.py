"""Which tokens of an arena are free: contiguous extents, handed out first-fit."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class Extents:
    """First-fit allocator of contiguous extents over `capacity` tokens.

    Semantics: the free space is a sorted list of holes `(start, length)`, none empty, no two touching.
    `take` carves an extent out of the hole around it; `release` gives one back and joins it to its neighbours.
    Everything else is in use. The class knows no names and moves no data.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = 0
        self.free = 0
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self.grow(capacity)

    @property
    def used(self) -> int:
        return self.capacity - self.free

    @property
    def holes(self) -> tuple[tuple[int, int], ...]:
        """`(start, length)` of every hole, in order."""
        return tuple(zip(self._starts, self._lengths, strict=True))

    @property
    def largest(self) -> int:
        """Length of the largest hole."""
        return max(self._lengths, default=0)

    @property
    def tail(self) -> int:
        """Free tokens at the very end."""
        if self._starts and self._starts[-1] + self._lengths[-1] == self.capacity:
            return self._lengths[-1]
        return 0

    def find(self, length: int) -> int | None:
        """Start of the first hole of at least `length` tokens; None where there is none."""
        for start, room in zip(self._starts, self._lengths, strict=True):
            if room >= length:
                return start
        return None

    def take(self, start: int, length: int) -> None:
        """Mark `[start, start + length)` as used; it must lie inside one hole."""
        at = bisect_right(self._starts, start) - 1
        if length <= 0 or at < 0 or start + length > self._starts[at] + self._lengths[at]:
            raise ValueError(f"extent [{start}, {start + length}) is not free")
        before = start - self._starts[at]
        after = self._lengths[at] - before - length
        pieces = [(s, n) for s, n in ((self._starts[at], before), (start + length, after)) if n]
        self._starts[at : at + 1] = [s for s, _ in pieces]
        self._lengths[at : at + 1] = [n for _, n in pieces]
        self.free -= length

    def release(self, start: int, length: int) -> None:
        """Mark `[start, start + length)` as free again; all of it must be in use."""
        end = start + length
        at = bisect_left(self._starts, start)
        left_end = self._starts[at - 1] + self._lengths[at - 1] if at else 0
        right_start = self._starts[at] if at < len(self._starts) else self.capacity
        if length <= 0 or start < left_end or end > right_start:
            raise ValueError(f"extent [{start}, {end}) is not in use")
        first, last = at, at
        if at and left_end == start:
            first, start = at - 1, self._starts[at - 1]
        if at < len(self._starts) and right_start == end:
            last, end = at + 1, right_start + self._lengths[at]
        self._starts[first:last] = [start]
        self._lengths[first:last] = [end - start]
        self.free += length

    def grow(self, capacity: int) -> None:
        """Add free tokens at the end, up to `capacity`."""
        added = capacity - self.capacity
        if added < 0:
            raise ValueError(f"extents cannot shrink from {self.capacity} to {capacity} tokens")
        if added:
            start, self.capacity = self.capacity, capacity
            self.release(start, added)


@dataclass(eq=False)
class Room:
    """Tokens `low` to `high - 1` between two extents that may not move, `free` of them free."""

    low: int
    high: int
    free: int = 0


class Rooms:
    """The rooms that `fixed` extents `(start, length)` divide an arena into.

    Semantics: whatever moves inside a room stays inside it, so `free` is the longest extent a room can offer.
    """

    def __init__(self, extents: Extents, fixed: Iterable[tuple[int, int]]) -> None:
        walls = sorted(fixed)
        self._lows = [0, *(start + length for start, length in walls)]
        highs = [*(start for start, _ in walls), extents.capacity]
        self._rooms = [Room(low, high) for low, high in zip(self._lows, highs, strict=True)]
        for start, length in extents.holes:
            self.at(start).free += length

    def __iter__(self) -> Iterator[Room]:
        return iter(self._rooms)

    def at(self, token: int) -> Room:
        """The room a token outside the fixed extents lies in."""
        return self._rooms[bisect_right(self._lows, token) - 1]
