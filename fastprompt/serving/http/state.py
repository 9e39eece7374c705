"""What the routes of one app share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from fastprompt.serving.http.access import Access, Caller
from fastprompt.serving.http.errors import denied, not_found, unavailable
from fastprompt.serving.http.face import Engine
from fastprompt.serving.http.options import Options

if TYPE_CHECKING:
    from fastprompt.serving.http.metrics import Metrics
    from fastprompt.serving.http.vocabulary import Vocabulary

T = TypeVar("T")


@dataclass
class Server:
    """An engine, who may use it, and how the server stands.

    `loading` until the engine has started, `draining` once the server is to end; `active` counts requests in
    progress, `failure` is what kept the engine from starting.
    """

    engine: Engine
    access: Access
    options: Options
    metrics: Metrics
    vocabulary: Vocabulary
    uploads: asyncio.Semaphore
    disk: Executor
    loading: bool = False
    draining: bool = False
    active: int = 0
    failure: Exception | None = None

    async def on_disk(self, work: Callable[[], T]) -> T:
        """What `work` returns, run in a thread that may read and write files."""
        return await asyncio.get_running_loop().run_in_executor(self.disk, work)

    @property
    def longest_text(self) -> int:
        """Characters beyond which a text cannot fit, so that it need not be tokenized."""
        engine: Any = self.engine
        return engine.limits.max_model_len * self.vocabulary.longest

    @property
    def alive(self) -> bool:
        return self.loading or self.engine.alive

    @property
    def started(self) -> bool:
        """Whether the engine has its prompts and can be asked how it stands."""
        return not self.loading and self.engine.alive

    @property
    def ready(self) -> bool:
        return self.started and self.engine.ready and not self.draining


def server_of(request: Request) -> Server:
    """The server a request came to."""
    return request.app.state.server


def caller_of(request: Request) -> Caller:
    """Who sent a request: the gate has checked the key."""
    return request.state.caller


def need_ready(request: Request) -> None:
    """A dependency: 503 while the engine loads, drains or is dead."""
    if not server_of(request).ready:
        raise unavailable("the engine is not ready")


def need_started(request: Request) -> None:
    """A dependency: 503 while the engine loads or is dead."""
    if not server_of(request).started:
        raise unavailable("the engine is not ready")


def need_admin(request: Request) -> None:
    """A dependency: 403 unless the key is an administrator's."""
    if not caller_of(request).admin:
        raise denied()


def find_prompt(request: Request, model: str) -> str | None:
    """The prompt that `model` names, None for the bare backbone; 404 for what is not there or not this caller's.

    Both are looked up either way, so that neither the answer nor the time tells which it was.
    """
    server = server_of(request)
    allowed = caller_of(request).may_use(model)
    bare = model == server.engine.name
    known = model in server.engine.registry or bare
    if not (allowed and known):
        raise not_found(model)
    return None if bare else model
