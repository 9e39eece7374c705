"""Keys that follow their file, for servers that no signal reaches to have it read again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from fastprompt.errors import ConfigError
from fastprompt.serving.http.access import Access, Caller
from fastprompt.serving.listing import settled

log = logging.getLogger("fastprompt.serving")

LOOK_SECONDS = 1.0  # between looks at the file


class WatchedAccess(Access):
    """As `Access`; when a key comes, the file's time is looked at, once a second at most, and the file read again if it
    has changed. A file that is wrong, or gone, changes nothing, and is logged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._next = self._clock()
        self._seen: tuple[int, ...] | None = ()  # what the file was like when it was read; None: it was not there

    def authenticate(self, authorization: bytes | None) -> Caller | None:
        """The caller behind an `Authorization` header."""
        now = self._clock()
        if self._file is not None and now >= self._next:
            self._next = now + LOOK_SECONDS
            self._follow(self._file)
        return super().authenticate(authorization)

    def _follow(self, file: Path) -> None:
        stamp = _stamp(file)
        if stamp == self._seen:
            return
        self._seen = () if stamp and not settled(stamp[-1]) else stamp
        try:
            self.reload()
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("the keys were read again")


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
