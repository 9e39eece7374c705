"""Names of the prompts in a folder: listed once, sorted, kept up to date."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left, bisect_right, insort
from itertools import islice
from pathlib import Path

from fastprompt.errors import PromptFileError
from fastprompt.folders import check_name, current_folder, folder_name

REST = 0.005  # seconds to rest at a time while requests are answered beside a refresh
_SLICE = 200  # entries looked at between two rests
SETTLED_NS = 100_000_000  # file times may be this coarse: what is younger may change again without its time changing


def settled(time_ns: int) -> bool:
    """Whether a file's time is old enough to tell every later change."""
    return time.time_ns() - time_ns > SETTLED_NS


def check_prompt_name(name: object) -> str:
    """`name`, if it can name a prompt: a printable path component that does not start with a dot."""
    if not isinstance(name, str) or not name.isprintable():
        raise PromptFileError(f"{name!r} cannot name a prompt: expected printable characters")
    return check_name(name)


def is_prompt_name(name: object) -> bool:
    """Whether `check_prompt_name` takes it."""
    try:
        check_prompt_name(name)
    except PromptFileError:
        return False
    return True


class Listing:
    """Sorted names of a folder's sub-folders, as of the last `refresh` and the calls of `add` and `remove` since.

    `generation` changes with the names. All methods may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.generation = 0
        self._refreshing = threading.Lock()  # one refresh at a time
        self._lock = threading.Lock()  # never held for more than a slice of the folder, or one pass over the names
        self._names: list[str] = []
        self._turns: dict[str, int] = {}  # the same names, and the listing that saw each last
        self._turn = 0
        self._removed: set[str] = set()  # since the listing that runs began, which may have seen them before
        self._listed: int | None = None  # the folder's time when it was last listed

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, name: str) -> bool:
        return name in self._turns

    def page(self, after: str | None, limit: int | None) -> list[str]:
        """Names behind `after` only, at most `limit` of them."""
        with self._lock:
            first = 0 if after is None else bisect_right(self._names, after)
            return self._names[first : None if limit is None else first + max(limit, 0)]

    def add(self, name: str) -> None:
        """Note that a name is there."""
        with self._lock:
            self._removed.discard(name)
            if name not in self._turns:
                insort(self._names, name)
                self.generation += 1
            self._turns[name] = self._turn

    def remove(self, name: str) -> None:
        """Note that a name is not there."""
        with self._lock:
            self._removed.add(name)
            if self._turns.pop(name, None) is not None:
                del self._names[bisect_left(self._names, name)]
                self.generation += 1

    def refresh(self, rest: float = 0.0) -> bool:
        """List the folder if its time has changed since; whether names came or went.

        It sleeps `rest` seconds after every 200 entries, so that other threads have the interpreter most of the time.
        """
        with self._refreshing:
            try:
                changed = os.stat(self.folder).st_mtime_ns
                if changed == self._listed:
                    return False
                with self._lock:
                    self._turn += 1
                    self._removed.clear()
                new = self._scan(rest)
            except OSError as error:
                raise PromptFileError(f"folder {self.folder} cannot be listed ({error})") from error
            self._listed = changed if settled(changed) else None
            return self._take(new)

    def _scan(self, rest: float) -> set[str]:
        """Look through the folder: known names that are there are of this turn now, the others are returned."""
        new = set()
        with os.scandir(self.folder) as entries:
            while some := list(islice(entries, _SLICE)):
                with self._lock:
                    for entry in some:
                        name = entry.name if entry.name in self._turns else _checked(entry.name)
                        if name is None or not _is_folder(entry):
                            continue
                        if name in self._turns:
                            self._turns[name] = self._turn
                        else:
                            new.add(name)
                if rest:
                    time.sleep(rest)
        return new

    def _take(self, new: set[str]) -> bool:
        """Take in what a listing found; whether that changed anything."""
        with self._lock:
            missed = [name for name, turn in self._turns.items() if turn != self._turn]
        # a name that is being replaced while the folder is listed may be missed
        gone = {name for name in missed if not current_folder(self.folder / name).is_dir()}
        with self._lock:
            gone = {name for name in gone if self._turns.get(name) != self._turn}  # stored again meanwhile
            new = new - self._removed - self._turns.keys()
            if gone:
                self._turns = {name: turn for name, turn in self._turns.items() if name not in gone}
                self._names = [name for name in self._names if name in self._turns]
            if new:
                self._turns |= dict.fromkeys(new, self._turn)
                self._names += new
                self._names.sort()
            self.generation += bool(new or gone)
            return bool(new or gone)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, a file system that is away: it concerns no other prompt
        return False


def _checked(entry: str) -> str | None:
    """The prompt that a directory entry stands for, None for none."""
    name = folder_name(entry)
    return name if name is not None and is_prompt_name(name) else None
