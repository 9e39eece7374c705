"""A load generator: streamed completions over plain HTTP/1.1, closed loop, tenants drawn by Zipf's law."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
_END = b"data: [DONE]"


@dataclass(frozen=True)
class Answer:
    """One request's answer; times in seconds, `at` is when it was whole, by the monotonic clock."""

    model: str
    text: str
    tokens: int
    first: float
    total: float
    error: str = ""
    at: float = field(default_factory=time.monotonic)


@dataclass
class Traffic:
    """What clients ask: a text under a tenant's model, tenants with probability proportional to rank ** -exponent."""

    models: Sequence[str]
    texts: Sequence[str]
    new: int
    exponent: float = 1.1
    seed: int = 0
    _random: random.Random = field(init=False)
    _weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._weights = list(itertools.accumulate((i + 1) ** -self.exponent for i in range(len(self.models))))

    def body(self) -> dict[str, Any]:
        """The next request."""
        (model,) = self._random.choices(self.models, cum_weights=self._weights)
        return completion(model, self._random.choice(self.texts), self.new)


def completion(model: str, text: str, new: int) -> dict[str, Any]:
    """A greedy, streamed completion of exactly `new` tokens."""
    return {
        "model": model,
        "prompt": text,
        "max_tokens": new,
        "temperature": 0,
        "min_tokens": new,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def load(port: int, traffic: Traffic, clients: int, seconds: float) -> list[Answer]:
    """`clients` connections that ask again as soon as they are answered, for some time; all answers."""
    end = time.monotonic() + seconds
    answers: list[Answer] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        try:
            while time.monotonic() < end:
                answers.append(await ask(reader, writer, traffic.body()))
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> Answer:
    """One request on an open connection."""
    content = json.dumps(body).encode()
    began = time.monotonic()
    writer.write(_HEAD % len(content) + content)
    status = int((await reader.readline()).split()[1])
    length = await _headers(reader)
    if status != 200:
        text = (await reader.readexactly(length)).decode()
        return Answer(body["model"], "", 0, 0.0, time.monotonic() - began, f"{status}: {text}")
    first, pieces, tokens = 0.0, [], 0
    async for event in _events(reader):
        first = first or time.monotonic() - began
        if "error" in event:
            return Answer(body["model"], "", 0, 0.0, time.monotonic() - began, str(event["error"]))
        pieces += [choice["text"] for choice in event["choices"]]
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Answer(body["model"], "".join(pieces), tokens, first, time.monotonic() - began)


async def _headers(reader: asyncio.StreamReader) -> int:
    """Skip the headers; the content's length, 0 if it comes in chunks."""
    length = 0
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return length


async def _events(reader: asyncio.StreamReader) -> Any:
    """The events of a chunked stream, up to its end."""
    ended = False
    pending = b""
    while size := int((await reader.readline()).strip() or b"0", 16):
        pending += (await reader.readexactly(size + 2))[:-2]
        *events, pending = pending.split(b"\n\n")
        for event in events:
            ended = ended or event.startswith(_END)
            if event.startswith(b"data: ") and not ended:
                yield json.loads(event[6:])
    await reader.readline()
