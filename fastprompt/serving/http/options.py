"""The server's own limits, apart from the engine's."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """What a request may be, and how long a client may take.

    `max_body_bytes` and `max_upload_bytes` bound a request's body and an uploaded prompt; `max_texts` texts of at most
    `max_choices` choices in all are answered by one request, `max_messages` make a chat. A client that takes nothing,
    or sends nothing, for `stall_seconds` is let go. `hosts` are the host names under which the server may be
    addressed, None for any: without keys it keeps pages of other sites out. `open_metrics` shows /metrics without a
    key. `page` names are listed at once unless a request says otherwise, at most `max_page`. `refresh_seconds` lie
    between looks for prompts that other processes brought.
    """

    max_body_bytes: int = 4 * MIB
    max_upload_bytes: int = 65 * MIB
    max_uploads: int = 2
    max_texts: int = 128
    max_choices: int = 256
    max_messages: int = 1024
    stall_seconds: float = 30.0
    hosts: frozenset[str] | None = None
    open_metrics: bool = False
    page: int = 1000
    max_page: int = 10_000
    refresh_seconds: float = 5.0
