"""A stream that breaks off and goes on in a second answer to the same request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastprompt.errors import FastPromptError
from fastprompt.serving.http.stream import DONE, event_of

_END = b"\n\n"
_DATA = b"data: "


class DivergedError(FastPromptError, RuntimeError):
    """A second answer is not the one that was begun: the prompt was replaced, or two tokens were as good as equal."""


@dataclass
class _Choice:
    """Text of one choice that was passed on, and how much of it this answer has had."""

    text: str = ""
    at: int = 0
    opened: bool = False
    finished: bool = False


class Continuation:
    """What of a stream was passed on, and what another answer to the same request has beyond it.

    Semantics:
        take(events)   the part of them that was not passed on yet: all, in the first answer
        again()        another answer begins: its text must begin with what was passed on
    Events are completions' or chats' without log-probabilities, whole ones. Those of later answers carry the first
    one's id and time. Errors: DivergedError.
    """

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._head: dict[str, Any] = {}  # the first answer's id and time
        self._first = True
        self._closed: set[str] = set()  # which of the closing events were passed on

    def again(self) -> None:
        self._first = False
        for choice in self._choices.values():
            choice.at = 0

    def take(self, events: bytes) -> bytes:
        return b"".join(self._left(event + _END) for event in events.split(_END) if event)

    def _left(self, event: bytes) -> bytes:
        """What of an event is to be passed on."""
        if event == DONE:
            return b"" if self._closes("done") else event
        content = json.loads(event.removeprefix(_DATA))
        if "choices" not in content:  # an error
            return event
        self._head = self._head or {name: content[name] for name in ("id", "created")}
        parts = content["choices"]
        known = not self._take(parts[0]) if parts else self._closes("usage")
        if self._first:
            return event
        return b"" if known else event_of(content | self._head)

    def _closes(self, kind: str) -> bool:
        """Note a closing event; whether it was passed on before."""
        known = kind in self._closed
        self._closed.add(kind)
        return known

    def _take(self, part: dict[str, Any]) -> bool:
        """Cut what was passed on out of a choice's part; whether anything is left."""
        choice = self._choices.setdefault(part["index"], _Choice())
        holder, name = (part["delta"], "content") if "delta" in part else (part, "text")
        text, opens, ends = holder.get(name, ""), "role" in holder, part["finish_reason"] is not None
        known = choice.text[choice.at : choice.at + len(text)]
        rest = text[len(known) :]
        choice.at += len(text)
        choice.text += rest
        if not text.startswith(known) or (rest and choice.finished) or (ends and choice.at < len(choice.text)):
            raise DivergedError("another replica's answer to the same request differs")
        if known:
            holder[name] = rest
        new = bool(rest) or (ends and not choice.finished) or (opens and not choice.opened)
        choice.finished |= ends
        choice.opened |= opens
        return new
