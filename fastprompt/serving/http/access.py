"""Who may use the server: API keys, what each may ask for, and administrators."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from fastprompt.errors import ConfigError
from fastprompt.serving.http.keys_file import KeyEntry, read_keys
from fastprompt.serving.http.rates import Clock, Limiter


@dataclass(frozen=True)
class Names:
    """A set of prompt names: some exactly, some by patterns with `*`, `?` and `[...]`."""

    entries: tuple[str, ...]

    @cached_property
    def exact(self) -> frozenset[str]:
        return frozenset(self.entries)

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(translate(e)) for e in self.entries if any(c in e for c in "*?["))

    def __contains__(self, name: object) -> bool:
        return name in self.exact or any(p.match(str(name)) for p in self.patterns)


ALL = Names(("*",))


@dataclass(frozen=True, eq=False)
class Caller:
    """The owner of a key: its name in logs, the models it may name, whether it administers, and its limits."""

    name: str
    models: Names = ALL
    admin: bool = False
    limiter: Limiter = field(default_factory=lambda: Limiter(None, None))

    def may_use(self, model: str) -> bool:
        return model in self.models


ANYONE = Caller("anyone", admin=True)


class Access:
    """The keys in force, from a file and from lists; without any, everybody may do everything.

    Semantics:
        caller = authenticate("Bearer KEY")    # None: no such key
        reload()                               # the file again; a file that is wrong changes nothing

    Only sha256 digests of keys are kept, and a key that comes is compared with every one of them in constant time.
    `file` is TOML or JSON (docs/serving.md); `api_keys` and `admin_keys` may use every prompt, without limits.
    Errors: ConfigError with every problem of the keys.
    """

    def __init__(
        self,
        file: Path | None = None,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._file, self._clock = file, clock
        self._fixed = [KeyEntry.of_list(key, i, admin) for admin, keys in ((False, api_keys), (True, admin_keys))
                       for i, key in enumerate(keys)]  # fmt: skip
        self._callers: list[tuple[bytes, KeyEntry, Caller]] = []
        self.reload()

    @property
    def open(self) -> bool:
        """Whether there are no keys at all."""
        return not self._callers

    def reload(self) -> None:
        """Read the file again; a key that stays as it was keeps what it has used of its limits."""
        entries = [*self._fixed, *(read_keys(self._file) if self._file else ())]
        if self._file and not entries:
            raise ConfigError([f"{self._file} has no keys: everybody could do everything"])
        _check_unique(entries)
        known = {entry: caller for _, entry, caller in self._callers}
        self._callers = [(bytes.fromhex(e.sha256), e, known.get(e) or self._caller(e)) for e in entries]

    def authenticate(self, authorization: bytes | None) -> Caller | None:
        """The caller behind an `Authorization` header."""
        if self.open:
            return ANYONE
        scheme, _, key = (authorization or b"").strip().partition(b" ")
        digest = sha256(key.strip()).digest()
        found = None
        for known, _, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found if scheme.lower() == b"bearer" else None

    def _caller(self, entry: KeyEntry) -> Caller:
        limiter = Limiter(entry.requests_per_minute, entry.tokens_per_minute, self._clock)
        return Caller(entry.name, Names(entry.prompts), entry.admin, limiter)


def _check_unique(entries: Iterable[KeyEntry]) -> None:
    problems, names, digests = [], set(), dict[str, str]()
    for entry in entries:
        if entry.name in names:
            problems.append(f"two keys are named {entry.name!r}: choose another name")
        if entry.sha256 in digests:
            problems.append(f"{entry.name!r} has the same key as {digests[entry.sha256]!r}: make another one")
        names.add(entry.name)
        digests[entry.sha256] = entry.name
    if problems:
        raise ConfigError(problems)
