"""The rows of one HTTP request as one stream, which never holds the engine up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType

from fastprompt.serving.http.errors import ApiError
from fastprompt.serving.http.face import TextEngine
from fastprompt.serving.request import Delta, Generation

Key = tuple[int, int]  # which text, which of its choices


class Rows:
    """Deltas of several generations, as they come: lists of pairs (text, delta).

    Semantics:
        async with Rows(engine, generations) as rows:     # they run
            async for news in rows: ...
        # left early: what still runs is cancelled

    What nobody takes is put together, choice by choice: a slow reader gets fewer and longer deltas, and what waits
    for it is never more than the rows' own text. The first error of a generation ends them all.
    """

    def __init__(self, engine: TextEngine, generations: Sequence[Generation]) -> None:
        self._engine, self._generations = engine, generations
        self._waiting: dict[Key, Delta] = {}
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0
        self._error: Exception | None = None

    async def __aenter__(self) -> Rows:
        self._running = len(self._generations)
        self._tasks = [asyncio.create_task(self._follow(i, g)) for i, g in enumerate(self._generations)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            done = self._running == 0
            taken, self._waiting = self._waiting, {}
            if any(delta.finish_reason == "abort" for delta in taken.values()):
                raise ApiError(503, "the server ended this request before it was answered", code="aborted")
            if taken:
                yield [(text, delta) for (text, _), delta in taken.items()]
            if done:
                return

    async def _follow(self, text: int, generation: Generation) -> None:
        try:
            async with aclosing(self._engine.generate(generation)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    key = text, delta.index
                    before = self._waiting.get(key)
                    self._waiting[key] = delta if before is None else _joined(before, delta)
                    self._news.set()
        except Exception as error:
            self._error = self._error or error
        finally:
            self._running -= 1
            self._news.set()


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.index,
        first.text + second.text,
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        second.finish_reason,
        second.stop_reason,
    )
