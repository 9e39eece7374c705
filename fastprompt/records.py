"""Which versions of prompts a bank holds: by name, in the order of their use, and pinned ones that lost their name."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from fastprompt.errors import PromptNotFoundError

_NAMES_COMPARED = 10_000  # names looked at for a suggestion: comparing is slow


@dataclass(frozen=True)
class Entry:
    """One version of a prompt in the bank: arena tokens `start` to `start + length - 1`, read in `layers` only."""

    name: str
    version: str
    start: int
    length: int
    layers: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """A version's entry and its pins; it may outlive its name."""

    entry: Entry
    pins: int = 0


class Records:
    """Versions by name, least recently used first, and those that are pinned.

    Semantics: a version is live while its name stands for it. `remove` and `unpin` say whether it is now neither live
    nor pinned, so that nobody can reach it any more. The class knows no memory; one thread at a time is inside.
    """

    def __init__(self) -> None:
        self._live: OrderedDict[str, Record] = OrderedDict()
        self._pinned: dict[int, Record] = {}  # by start, which cannot change while pinned

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, name: object) -> bool:
        return name in self._live

    def __iter__(self) -> Iterator[Record]:
        return iter(self._live.values())

    @property
    def pinned(self) -> Collection[Record]:
        return self._pinned.values()

    @property
    def retired(self) -> int:
        """How many pinned versions are not live."""
        return sum(not self.is_live(record) for record in self._pinned.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._live)

    def find(self, name: str) -> Record:
        """The live version of a name. Raises PromptNotFoundError."""
        record = self._live.get(name)
        if record is None:
            near = difflib.get_close_matches(str(name), islice(self._live, _NAMES_COMPARED))
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "put it first"
            raise PromptNotFoundError(f"name {name!r} is not among the bank's {len(self)} prompts; {hint}")
        return record

    def is_live(self, record: Record) -> bool:
        return self._live.get(record.entry.name) is record

    def use(self, name: str) -> None:
        """Make a name the most recently used one."""
        self._live.move_to_end(name)

    def add(self, entry: Entry) -> None:
        """Let a free name stand for a version."""
        self._live[entry.name] = Record(entry)

    def remove(self, record: Record) -> bool:
        """Take a live version's name away."""
        del self._live[record.entry.name]
        return not record.pins

    def pin(self, record: Record) -> None:
        record.pins += 1
        self._pinned[record.entry.start] = record

    def unpin(self, record: Record) -> bool:
        record.pins -= 1
        if record.pins:
            return False
        del self._pinned[record.entry.start]
        return not self.is_live(record)
