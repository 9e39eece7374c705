"""Streamed answers taken apart."""

from __future__ import annotations

import json
from typing import Any


def events(text: str) -> list[Any]:
    """The events of a stream, the last one as text."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


def joined(found: list) -> dict[int, str]:
    """The texts of a stream's choices; everything else of it is checked."""
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1, found
    assert len({(event["id"], event["created"]) for event in found[:-1]}) == 1
    texts: dict[int, str] = {}
    ended, opened = set(), set()
    for event in found[:-1]:
        for part in event["choices"]:
            assert part["index"] not in ended
            holder = part.get("delta", part)
            if "role" in holder:
                assert part["index"] not in opened
                opened.add(part["index"])
            texts[part["index"]] = texts.get(part["index"], "") + holder.get("text", holder.get("content", ""))
            if part["finish_reason"] is not None:
                ended.add(part["index"])
    assert ended == set(texts)
    return texts
