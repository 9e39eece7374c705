"""Names of the prompts in a folder: listed once, sorted, kept up to date."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left, bisect_right
from pathlib import Path

from fastprompt.errors import PromptFileError
from fastprompt.folders import check_name, folder_name

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
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._listed: int | None = None  # the folder's time when it was last listed

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return self._find(name)[1]

    def page(self, after: str | None, limit: int | None) -> list[str]:
        """Names behind `after` only, at most `limit` of them."""
        with self._lock:
            first = 0 if after is None else bisect_right(self._names, after)
            return self._names[first : None if limit is None else first + max(limit, 0)]

    def add(self, name: str) -> None:
        """Note that a name is there."""
        with self._lock:
            at, known = self._find(name)
            if not known:
                self._names.insert(at, name)
                self.generation += 1

    def remove(self, name: str) -> None:
        """Note that a name is not there."""
        with self._lock:
            at, known = self._find(name)
            if known:
                del self._names[at]
                self.generation += 1

    def refresh(self) -> bool:
        """List the folder if its time has changed since; whether names came or went."""
        before = self.generation
        try:
            changed = os.stat(self.folder).st_mtime_ns
            if changed == self._listed:
                return False
            names = self._scan()
        except OSError as error:
            raise PromptFileError(f"folder {self.folder} cannot be listed ({error})") from error
        with self._lock:
            if self.generation != before:  # somebody wrote meanwhile: the next call sees all of it
                return True
            self._listed = changed if settled(changed) else None
            if names == self._names:
                return False
            self._names = names
            self.generation += 1
            return True

    def _scan(self) -> list[str]:
        known = set(self._names)  # these need no check any more
        with os.scandir(self.folder) as entries:
            found = {
                name
                for entry in entries
                if (name := entry.name if entry.name in known else _checked(entry.name)) and _is_folder(entry)
            }
        return sorted(found)

    def _find(self, name: str) -> tuple[int, bool]:
        at = bisect_left(self._names, name)
        return at, self._names[at : at + 1] == [name]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, a file system that is away: it concerns no other prompt
        return False


def _checked(entry: str) -> str | None:
    """The prompt that a directory entry stands for, None for none."""
    name = folder_name(entry)
    return name if name is not None and is_prompt_name(name) else None
