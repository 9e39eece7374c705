"""Prompts in host memory, least recently used ones first to go."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Copy = TypeVar("Copy", bound=Sized)


class HostTier(Generic[Copy]):
    """Copies by version, together at most `budget` bytes; `evictions` counts those that had to leave.

    A copy above the whole budget is not taken in. The caller sees to it that one thread at a time is inside.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.evictions = 0
        self._copies: OrderedDict[str, Copy] = OrderedDict()

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, version: str) -> bool:
        return version in self._copies

    def get(self, version: str) -> Copy | None:
        """A copy, now the most recently used one."""
        copy = self._copies.get(version)
        if copy is not None:
            self._copies.move_to_end(version)
        return copy

    def put(self, version: str, copy: Copy) -> None:
        """Take a copy in, and let others go where it needs their room."""
        self.discard(version)
        if copy.nbytes > self.budget:
            return
        while self.bytes + copy.nbytes > self.budget:
            self.bytes -= self._copies.popitem(last=False)[1].nbytes
            self.evictions += 1
        self._copies[version] = copy
        self.bytes += copy.nbytes

    def discard(self, version: str) -> None:
        """Forget a copy, if it is there."""
        copy = self._copies.pop(version, None)
        if copy is not None:
            self.bytes -= copy.nbytes
