"""Keys as an administrator writes them: a TOML or JSON file, or a list in an environment variable."""

from __future__ import annotations

import json
import sys
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fastprompt.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MIN_KEY = 16  # characters: shorter ones can be guessed
PREFIX = "sha256:"

Limit = Annotated[int, Field(ge=1, le=10**12)]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class _Secret(_Table):
    """A name and a key, written plainly or as its sha256 in hexadecimal."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    key: Annotated[str, Field(min_length=MIN_KEY, max_length=512)] | None = None
    sha256: Digest | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _Secret:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.key is not None and (self.key != self.key.strip() or not self.key.isascii()):
            raise ValueError("key must be ASCII without spaces around it")
        return self

    @property
    def digest(self) -> str:
        return self.sha256 or digest_of(self.key or "")


class _UserKey(_Secret):
    prompts: Annotated[list[str], Field(max_length=100_000)]
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None


class _File(_Table):
    keys: list[_UserKey] = []
    admin_keys: list[_Secret] = []


class KeyEntry(_Table):
    """A key in force: its digest, the prompts it may name (or patterns of names), its limits."""

    name: str
    sha256: Digest
    prompts: tuple[str, ...] = ("*",)
    admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of_list(cls, key: str, place: int, admin: bool) -> KeyEntry:
        """Entry `place` of a list: a key, or `sha256:` and its digest."""
        name = f"{'admin' if admin else 'api'} key {place + 1} of the environment"
        written = {"sha256": key[len(PREFIX) :]} if key.startswith(PREFIX) else {"key": key}
        try:
            return cls(name=name, sha256=_Secret(name=name, **written).digest, admin=admin)
        except ValidationError as error:
            raise ConfigError(_problems(name, error)) from None


def digest_of(key: str) -> str:
    """The sha256 of a key, in hexadecimal, as a keys file may hold it."""
    return hash_of(key.encode()).hexdigest()


def read_keys(path: Path) -> list[KeyEntry]:
    """The keys of a file. Errors: ConfigError with every problem; keys themselves are never shown."""
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        found = _File.model_validate(data)
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
    except ValidationError as error:
        raise ConfigError(_problems(str(path), error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path} is neither TOML nor JSON by its name and content: {error}"]) from None
    users = [
        KeyEntry(
            name=key.name,
            sha256=key.digest,
            prompts=tuple(key.prompts),
            requests_per_minute=key.requests_per_minute,
            tokens_per_minute=key.tokens_per_minute,
        )
        for key in found.keys
    ]
    return users + [KeyEntry(name=key.name, sha256=key.digest, admin=True) for key in found.admin_keys]


def _problems(where: str, error: ValidationError) -> list[str]:
    return [f"{where}: {'.'.join(map(str, p['loc'])) or 'keys'}: {p['msg']}" for p in error.errors(include_input=False)]
