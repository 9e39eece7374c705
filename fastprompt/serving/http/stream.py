"""Answering: rows to one JSON object, or to server-sent events; a client that goes away takes its rows with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyio import fail_after
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastprompt.serving.http.answers import Choice, Form, usage_of
from fastprompt.serving.http.errors import ApiError, explain, reply
from fastprompt.serving.http.face import TextEngine
from fastprompt.serving.http.rates import Limiter
from fastprompt.serving.http.rows import Rows
from fastprompt.serving.request import Delta, Generation

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client reads no more."""


@dataclass
class Work:
    """One HTTP request's generations, the form of the answer, and what its key has reserved for it; `refused` if it
    failed before its first token."""

    engine: TextEngine
    generations: Sequence[Generation]
    form: Form
    limiter: Limiter
    include_usage: bool = False
    stall_seconds: float = 30.0
    reserved: int = 0
    refused: bool = False
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.per_text = self.generations[0].params.n
        self.choices = [Choice() for _ in range(self.per_text * len(self.generations))]

    def take(self, text: int, delta: Delta) -> int:
        """Put a delta where it belongs; the place of its choice in the answer."""
        index = text * self.per_text + delta.index
        self.choices[index].add(delta)
        return index

    @property
    def usage(self) -> dict[str, Any]:
        return usage_of(sum(len(g.token_ids) for g in self.generations), self.choices)

    def settle(self) -> None:
        """Give the key back what it reserved and did not use: all of it where nothing was answered."""
        self.limiter.settle(self.reserved, 0 if self.refused else self.usage["total_tokens"])

    def explain(self, error: Exception) -> ApiError:
        """What the client is told of an error that ended the work."""
        self.refused = not any(choice.tokens for choice in self.choices)
        return explain(error)


class Answer(Response):
    """A response that runs its work while the client is there, and cancels what is left when it goes away."""

    def __init__(self, work: Work, headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._answer(scope, receive, send))
        except ClientGone:
            return
        finally:
            self._work.settle()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeAnswer(Answer):
    """All of an answer as one JSON object."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work
        try:
            async with Rows(work.engine, work.generations) as rows:
                async for news in rows:
                    for text, delta in news:
                        work.take(text, delta)
        except Exception as error:
            await reply(work.explain(error))(scope, receive, send)
            return
        content = to_json(work.form.whole(work.choices, work.usage))
        await Response(content, media_type="application/json")(scope, receive, send)


class EventStream(Answer):
    """An answer in server-sent events.

    Semantics:
        nothing is sent before the first delta: what is wrong with a request gets its own status
        an error after that is an event `{"error": ...}`, which ends the stream
        a client that takes nothing for `stall_seconds` is let go
    """

    media_type = "text/event-stream"

    def __init__(self, work: Work) -> None:
        super().__init__(work, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        events = self._events()
        try:
            async for event in events:
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                await self._send(send, event)
        except ClientGone:
            raise
        except Exception as error:
            said = self._work.explain(error)
            if not started:
                await reply(said)(scope, receive, send)
                return
            await self._send(send, event_of(said.body))
        finally:
            await events.aclose()
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, event: bytes, more: bool = True) -> None:
        try:
            with fail_after(self._work.stall_seconds):
                await send({"type": "http.response.body", "body": event, "more_body": more})
        except (TimeoutError, OSError) as error:
            raise ClientGone from error

    async def _events(self) -> AsyncGenerator[bytes, None]:
        work, form = self._work, self._work.form
        opened: set[int] = set()
        async with Rows(work.engine, work.generations) as rows:
            async for news in rows:
                events = []
                for text, delta in news:
                    index = work.take(text, delta)
                    if index not in opened and (opening := form.opening(index)) is not None:
                        events.append(self._chunk(opening))
                    opened.add(index)
                    events.append(self._chunk(form.chunk(index, delta, work.choices[index])))
                yield b"".join(events)
        last = event_of(form.closing(work.usage)) if work.include_usage else b""
        yield last + DONE

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        return event_of(chunk | {"usage": None} if self._work.include_usage else chunk)


def answer(work: Work, stream: bool | None) -> Response:
    """The response that runs this work."""
    return EventStream(work) if stream else WholeAnswer(work)


def event_of(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


async def while_connected(receive: Receive, answering: Any) -> None:
    """Run the answer, unless the client goes away: then cancel it."""
    answered = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            answered.result()
    finally:
        for task in (answered, gone):
            task.cancel()
        await asyncio.gather(answered, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
