"""The application that clients talk to: it reads a request, sends it on by its prompt's name, and passes the answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from fastprompt.serving.http.access import Access
from fastprompt.serving.http.errors import ApiError, on_http_error, reply, unavailable
from fastprompt.serving.http.gate import Body, check_origin
from fastprompt.serving.http.options import Options
from fastprompt.serving.http.server import LOOPBACK, is_loopback
from fastprompt.serving.http.stream import event_of, while_connected
from fastprompt.serving.relay.resume import Continuation, DivergedError
from fastprompt.serving.relay.routes import Route, route

log = logging.getLogger("fastprompt.serving")

PAUSES = (0.0, 0.2, 1.0)  # seconds before a request is sent again
_KEPT = ("type", "asgi", "http_version", "method", "scheme", "query_string", "headers", "client", "server")

Ask = Callable[[Scope, bytes, str], AsyncGenerator[Sequence[Message], None]]


@dataclass(frozen=True)
class Servers:
    """How servers are reached.

    `ask(scope, body, key)` yields what one of them sends, the same one for the same key while it lives; it raises one
    of `lost` where that server died. `bare` is the backbone's own name.
    """

    ask: Ask
    lost: tuple[type[Exception], ...]
    bare: str


class Front:
    """An ASGI application over several servers.

    Semantics:
        a server dies, nothing passed on yet     the request is sent again: nobody notices
        ... within a stream                      greedy and seeded text goes on where it stopped, by another answer
                                                 whose beginning is left out; else an event says so and ends it
        ... while a prompt is written, deleted   503: the request may have been carried out
    Keys are checked before a body is read; the servers check them too. Without any, and unless `insecure`, only
    clients on this machine are answered, and no pages of other sites that they have open.
    """

    def __init__(
        self, servers: Servers, access: Access, options: Options | None = None, insecure: bool = False
    ) -> None:
        self._servers, self._access = servers, access
        self._options, self._insecure = options or Options(), insecure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_client(scope)
            plain = _plain(scope)
            body = await self._read(plain, receive)
        except ApiError as error:
            await reply(error)(scope, receive, send)
            return
        except HTTPException as error:
            response = await on_http_error(Request(scope), error)
            await response(scope, receive, send)
            return
        chosen = route(plain["method"], plain["path"], body, self._servers.bare)
        plain["headers"] = _resized(plain["headers"], len(chosen.body))
        await while_connected(receive, self._answer(plain, chosen, _Passing(scope, receive, send, chosen)))

    async def _answer(self, scope: Scope, chosen: Route, passing: _Passing) -> None:
        for pause in (*PAUSES, None):
            try:
                async with aclosing(self._servers.ask(scope, chosen.body, chosen.key)) as answer:
                    async for messages in answer:
                        for message in messages:
                            await passing.take(message)
                return
            except DivergedError as error:
                await passing.fail(f"the replica that answered has ended, and {error}: ask again")
                return
            except self._servers.lost as error:
                log.warning("a replica ended while it answered %s %s: %s", scope["method"], scope["path"], error)
                if pause is None or not passing.may_repeat:
                    await passing.fail("the replica that was to answer has ended")
                    return
            passing.again()
            await asyncio.sleep(pause)

    def _check_client(self, scope: Scope) -> None:
        if not self._access.open or self._insecure:
            return
        if not is_loopback((scope.get("client") or ("",))[0]):
            raise ApiError(
                403,
                "this application has no keys and answers only to its own machine: set keys to reach it from elsewhere",
                code="foreign_client",
            )
        check_origin(Headers(scope=scope), LOOPBACK)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; nothing of a caller's who has no key, whom the server will refuse."""
        authorization = Headers(scope=scope).get("authorization")
        if self._access.authenticate(authorization.encode("latin-1") if authorization else None) is None:
            return b""
        body, parts, more = Body(receive, scope, self._options), [], True
        while more:
            message = await body()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the client went away")
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(parts)


class _Passing:
    """An answer on its way to the client: whole ones are held until they are whole, streams go as they come."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, chosen: Route) -> None:
        self._scope, self._receive, self._send, self._route = scope, receive, send, chosen
        self._continuation = Continuation() if chosen.resume else None
        self._begun = False
        self._start: Message = {}
        self._held: list[bytes] = []

    @property
    def may_repeat(self) -> bool:
        return self._route.resume if self._begun else self._route.repeat

    def again(self) -> None:
        """Another answer begins."""
        self._held = []
        if self._continuation is not None:
            self._continuation.again()

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        streams = Headers(raw=self._start["headers"]).get("content-type", "").startswith("text/event-stream")
        if streams:
            await self._pass(body if self._continuation is None else self._continuation.take(body), more)
            return
        self._held.append(body)
        if more:
            return
        whole = b"".join(self._held)
        # a second answer that is an error, within a stream that was begun: its status can no longer be told
        await self._pass(whole if not self._begun else event_of(json.loads(whole)), False)

    async def fail(self, why: str) -> None:
        """Say that there is no answer, or no more of it."""
        error = unavailable(why)
        if self._begun:
            await self._pass(event_of(error.body), False)
        else:
            await reply(error)(self._scope, self._receive, self._send)

    async def _pass(self, body: bytes, more: bool) -> None:
        if not self._begun:
            await self._send(self._start)
            self._begun = True
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


class FrontResponse(Response):
    """A response that is whatever an application answers."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._front(scope, receive, send)


def _plain(scope: Scope) -> Scope:
    """What a server needs of a scope, in plain values, as if it were mounted at the root."""
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    return {name: scope[name] for name in _KEPT if name in scope} | {"path": path, "root_path": ""}


def _resized(headers: Sequence[tuple[bytes, bytes]], size: int) -> list[tuple[bytes, bytes]]:
    """Headers of a body that is read and may have another length."""
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(size).encode())]
