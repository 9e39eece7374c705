"""The engine behind asyncio: one thread runs its steps, any number of tasks wait for their pieces of text."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastprompt.errors import ArgumentError, FastPromptError
from fastprompt.serving.backlog import Backlog
from fastprompt.serving.engine import Engine, EngineStats, Limits, StepError
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.request import Delta, Finished, Generation, OverloadedError, Tokens
from fastprompt.serving.residency import Residency
from fastprompt.serving.text import Pieces

_log = logging.getLogger(__name__)
_COUNT_EVERY = 0.05  # seconds between counts while steps run
_IDLE = 0.05  # seconds to wait for a prompt that is being loaded before looking again


@dataclass(eq=False)
class _Request:
    """A request under way, on the loop's side; its generation has an id of the engine's own."""

    generation: Generation
    pieces: list[Pieces]
    events: asyncio.Queue[Delta | FastPromptError] = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    tokens: int = 0
    reason: str = "abort"


class AsyncEngine:
    """Requests from asyncio tasks to an `Engine` in a thread of its own.

    Semantics::

        engine = AsyncEngine(build, tokenizer, "my-backbone")
        await engine.start()                                   # calls build() in the thread, raises what it raises
        async for delta in engine.generate(generation): ...   # leaving the loop early cancels the request
        await engine.close(drain=30)                           # what runs may finish, nothing new is taken

    `generate` raises OverloadedError while `max_queued` requests are under way, or this prompt's share of them, or the
    engine closes; ArgumentError for a request that can never run, PromptNotFoundError for an unknown prompt, and
    whatever ended a row, when it did. Requests need no ids of their own: those that share one are kept apart.
    `observe` is called for every request that ended, on the loop. The thread does all of torch's work, the building
    too: a second thread that ever did some would keep a pool of threads of its own.
    """

    def __init__(self, build: Callable[[], Engine], tokenizer: Any, name: str, max_queued: int = 1024) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.engine: Engine
        self._build = build
        self.observe: Callable[[Finished], None] = lambda finished: None
        self._requests: dict[str, _Request] = {}
        self._backlog = Backlog(max_queued, "requests")
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], list[Tokens]]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closing = self._stop = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._built: asyncio.Future[None]
        self._stats: EngineStats
        self._counted = 0.0

    @property
    def limits(self) -> Limits:
        """What one row may be."""
        return self.engine.limits

    @property
    def registry(self) -> PromptRegistry:
        """The prompts on disk."""
        return self.engine.residency.registry

    @property
    def residency(self) -> Residency:
        return self.engine.residency

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.alive and not self._closing

    async def start(self) -> None:
        """Build the engine; call it once, from the loop that will call `generate`."""
        if self._thread is not None:
            raise ArgumentError("the engine was started before: make another one")
        self._loop = asyncio.get_running_loop()
        self._built = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="fastprompt-engine", daemon=True)
        self._thread.start()
        await self._built
        self.residency.on_ready = self._wake.set

    async def close(self, drain: float | None = None) -> None:
        """Take nothing new, let what runs finish for at most `drain` seconds (None: not at all), and end the thread."""
        self._closing = True
        end = time.monotonic() + (drain or 0.0)
        while self._requests and self.alive and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for name in list(self._requests):
            self._send(lambda name=name: self.engine.cancel(name))  # type: ignore[misc]
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if hasattr(self, "engine"):  # it was built
            await asyncio.to_thread(self.residency.close)

    def stats(self) -> EngineStats:
        """As of a moment ago."""
        return self._stats

    async def generate(self, generation: Generation) -> AsyncIterator[Delta]:
        """Pieces of the answer's choices as they come."""
        request = self._submit(generation)
        try:
            left = generation.params.n
            while left:
                event = await request.events.get()
                if isinstance(event, FastPromptError):
                    request.reason = "error"
                    raise event
                if event.finish_reason is not None:
                    left -= 1
                    request.reason = event.finish_reason
                yield event
        finally:
            self._forget(request)

    # the loop's side -------------------------------------------------------------------------------------------------

    def _submit(self, generation: Generation) -> _Request:
        if not self.ready:
            raise OverloadedError("the server is starting or closing: try again later", retry_after=5.0)
        self.engine.check(generation)
        if generation.prompt is not None:
            self.registry.current(generation.prompt)
        params = generation.params
        pieces = [Pieces(self.tokenizer, i, params.stop, params.min_tokens) for i in range(params.n)]
        self._backlog.enter(generation.prompt)
        own = replace(generation, request_id=f"{generation.request_id}#{next(self._numbers)}")
        request = self._requests[own.request_id] = _Request(own, pieces)
        self._send(lambda: self._add(own))
        return request

    def _send(self, command: Callable[[], list[Tokens]]) -> None:
        self._inbox.put(command)
        self._wake.set()

    def _deliver(self, events: list[Tokens]) -> None:
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue
            try:
                self._hand(request, event)
            except Exception as error:  # whatever a tokenizer does not like, it must not keep the others' events away
                _log.exception("tokens could not be made text")
                request.events.put_nowait(StepError(f"the answer's tokens could not be made text: {error!r}"))

    def _hand(self, request: _Request, event: Tokens) -> None:
        pieces = request.pieces[event.index]
        if pieces.stopped:
            return
        if event.tokens:
            request.tokens += len(event.tokens)
            request.first = request.first or time.monotonic()
        if event.error is not None:
            request.events.put_nowait(event.error)
            return
        delta = pieces.add(event)
        if pieces.stopped and event.finish_reason is None:
            index, name = event.index, event.request_id
            self._send(lambda: self.engine.cancel(name, index))
        if delta is not None:
            request.events.put_nowait(delta)

    def _forget(self, request: _Request) -> None:
        """The caller takes no more of it: cancel what still runs, and say that it ended."""
        name = request.generation.request_id
        del self._requests[name]
        self._backlog.leave(request.generation.prompt)
        self._send(lambda: self.engine.cancel(name))
        now = time.monotonic()
        first = None if request.first is None else request.first - request.began
        text = len(request.generation.token_ids)
        ended = Finished(request.generation.prompt, text, request.tokens, first, now - request.began, request.reason)
        try:
            self.observe(ended)
        except Exception:  # the answer is not its business
            _log.exception("observe failed")

    def _settle(self, error: BaseException | None) -> None:
        """The engine is built, or never will be; whoever waited for it may be gone."""
        if self._built.done():
            return
        if error is None:
            self._built.set_result(None)
        else:
            self._built.set_exception(error)

    def _fail(self, error: FastPromptError) -> None:
        """The thread ended: nothing new is taken, and who waits is told."""
        self._closing = True
        for request in self._requests.values():
            request.events.put_nowait(error)

    # the engine's thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.engine = self._build()
            self._stats = self.engine.stats()
        except BaseException as error:
            self._post(self._settle, error)
            return
        self._post(self._settle, None)
        try:
            while not self._stop or not self._inbox.empty():
                self._wake.clear()  # before looking at what it tells of, which may come again meanwhile
                events = self._commands()
                steps = self.engine.steps
                events += self.engine.step()  # also without rows: prompts are pinned, replaced and unloaded
                idle = self.engine.steps == steps
                self._tell(events, idle)
                if idle and not self._stop:
                    self._wake.wait(_IDLE if self.engine.waits else None)
        except Exception as error:
            _log.exception("the engine's thread ended")
            self._post(self._fail, StepError(f"the engine ended: {error!r}"))

    def _commands(self) -> list[Tokens]:
        events = []
        while True:
            try:
                events += self._inbox.get_nowait()()
            except queue.Empty:
                return events

    def _add(self, generation: Generation) -> list[Tokens]:
        """Give a request to the engine; what it ended with if that fails."""
        try:
            self.engine.add(generation)
        except Exception as error:  # it must not stop the others
            known = error if isinstance(error, FastPromptError) else StepError(f"it could not be taken in: {error!r}")
            return [Tokens(generation.request_id, 0, (), finish_reason="error", error=known)]
        return []

    def _tell(self, events: list[Tokens], idle: bool) -> None:
        """Hand out what a step gave, now and then with fresh counts: with many prompts, counting takes a while."""
        now = time.monotonic()
        if idle or now - self._counted > _COUNT_EVERY:
            self._stats, self._counted = self.engine.stats(), now
        self._post(self._deliver, events)

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        """Run something on the loop; without one nobody is left to work for."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # it is closed
            self._stop = True
