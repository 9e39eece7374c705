"""Conditional requests: a prompt's version is its entity tag (RFC 9110, section 13)."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from fastprompt.serving.http.errors import ApiError, invalid
from fastprompt.serving.registry import PromptRegistry

ANY = "*"
_TAGS = re.compile(r'\s*(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,\s*|$))')


def etag(version: str) -> str:
    """The entity tag of a version."""
    return f'"{version}"'


def wanted_version(headers: Headers, registry: PromptRegistry, name: str) -> str | None:
    """The version that `If-Match` asks for, "*" for any; None without the header.

    Of several, the one that is current. Errors: ApiError 412 if none of them is, 400 for a malformed header.
    """
    value = _header(headers, "if-match")
    if value is None:
        return None
    if value == ANY:
        return ANY
    tags = [tag for weak, tag in _tags("If-Match", value) if not weak]
    if len(tags) == 1:
        return tags[0]
    current = registry.current(name).version if name in registry else None
    if current is None or current not in tags:
        raise ApiError(412, f"prompt {name[:200]!r} is none of the versions in If-Match", code="precondition_failed")
    return current


def must_be_new(headers: Headers) -> bool:
    """Whether `If-None-Match: *` asks for a name that is free. Errors: ApiError 400 for anything else in it."""
    value = _header(headers, "if-none-match")
    if value not in (None, ANY):
        raise invalid("If-None-Match on a write takes only *, for a name that is free", "If-None-Match")
    return value == ANY


def unchanged(headers: Headers, version: str) -> bool:
    """Whether `If-None-Match` names the version that a reader has already."""
    value = _header(headers, "if-none-match")
    return value is not None and (value == ANY or version in [tag for _, tag in _tags("If-None-Match", value)])


def _header(headers: Headers, name: str) -> str | None:
    found = headers.getlist(name)
    return ", ".join(found).strip() if found else None


def _tags(header: str, value: str) -> list[tuple[bool, str]]:
    found, at = [], 0
    while at < len(value):
        match = _TAGS.match(value, at)
        if match is None:
            raise invalid(f'{header} is {value[:80]!r}, expected * or versions in quotes: "..."', header)
        found.append((bool(match[1]), match[2]))
        at = match.end()
    if not found:
        raise invalid(f"{header} is empty", header)
    return found
