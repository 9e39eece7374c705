"""What a prompt's folder holds now: read when asked for, remembered while its file does not change."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from fastprompt.errors import PromptFileError, PromptNotFoundError
from fastprompt.folders import current_folder
from fastprompt.prompt_format import METADATA, WEIGHTS, parse_metadata, sha256
from fastprompt.prompts import METHODS
from fastprompt.serving.listing import is_prompt_name, settled
from fastprompt.store import other_format

_CACHED = 16_384  # versions kept in memory
_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class PromptVersion:
    """What a name stands for at one moment.

    `version` is the SHA-256 of `prompt.json`, which holds that of the weights: equal exactly when both files are.
    `bytes` counts both, `created` is in seconds since 1970.
    """

    name: str
    version: str
    method: str
    kind: str  # "prefix" or "embedding"
    length: int
    bytes: int
    labels: tuple[str, ...] | None
    task_type: str | None
    folder: Path
    created: float


class Versions:
    """The current versions of prompts in the sub-folders of `folder`.

    Semantics: `current` looks at the time of one file, and reads that file where the time has changed, so it is never
    stale. `changes` counts the times it found another version than before. All methods may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changes = 0
        self._lock = threading.Lock()  # never held while files are read
        self._cache: OrderedDict[str, tuple[_Stamp | None, PromptVersion]] = OrderedDict()  # no stamp: read again

    def current(self, name: str) -> PromptVersion:
        """Errors: PromptNotFoundError; PromptFileError for a folder that holds no prompt, or a damaged one."""
        if not is_prompt_name(name):
            raise _unknown(name)
        try:
            stamp = _stamp(os.stat(f"{self.folder}/{name}/{METADATA}"))
        except OSError:  # not there, or being replaced, or left by a crash
            return self._read(name)
        with self._lock:
            held = self._cache.get(name)
            if held is not None and held[0] == stamp:
                self._cache.move_to_end(name)
                return held[1]
        return self._read(name)

    def forget(self, name: str) -> None:
        """Note that a name was written or removed."""
        with self._lock:
            self._cache.pop(name, None)
            self.changes += 1

    def _read(self, name: str) -> PromptVersion:
        target = self.folder / name
        for _ in range(3):  # between two looks a writer may move the folder
            folder = current_folder(target)
            path = folder / METADATA
            try:
                status = os.stat(path)
                raw = path.read_bytes()
                weights = os.stat(folder / WEIGHTS).st_size
                if _stamp(status) != _stamp(os.stat(path)):
                    continue
            except OSError:
                continue
            version = describe(target, raw, weights, status.st_mtime)
            self._remember(_stamp(status), version)
            return version
        if folder.exists():
            raise other_format(folder, WEIGHTS if (folder / METADATA).is_file() else METADATA)
        raise _unknown(name)

    def _remember(self, stamp: _Stamp, version: PromptVersion) -> None:
        with self._lock:
            held = self._cache.pop(version.name, None)
            self.changes += held is not None and held[1].version != version.version
            self._cache[version.name] = stamp if settled(stamp[1]) else None, version
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)


def describe(target: Path, metadata: bytes, weights: int, created: float) -> PromptVersion:
    """The version of prompt `target.name`: the content of its `prompt.json`, the size of its weights.

    Errors: PromptFileError.
    """
    fields = parse_metadata(metadata, f"{target}/{METADATA}")
    if fields["method"] not in METHODS:
        raise PromptFileError(
            f"{target}/{METADATA}: method is {fields['method'][:40]!r}, expected {', '.join(METHODS)}"
        )
    return PromptVersion(
        name=target.name,
        version=sha256(metadata),
        method=fields["method"],
        kind=METHODS[fields["method"]].kind,
        length=fields["length"],
        bytes=len(metadata) + weights,
        labels=None if fields["labels"] is None else tuple(fields["labels"]),
        task_type=fields["task_type"],
        folder=target,
        created=created,
    )


def _stamp(status: os.stat_result) -> _Stamp:
    """What changes whenever a file does."""
    return status.st_ino, status.st_ctime_ns, status.st_size


def _unknown(name: object) -> PromptNotFoundError:
    return PromptNotFoundError(f"prompt {name!r} is not registered: store it first")
