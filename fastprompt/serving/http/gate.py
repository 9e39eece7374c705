"""What every request passes first: its key, its rate, the size of its body."""

from __future__ import annotations

import time
import uuid
from urllib.parse import urlsplit

from anyio import fail_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastprompt.serving.http.access import ANYONE, Caller
from fastprompt.serving.http.errors import ApiError, explain, reply, unavailable
from fastprompt.serving.http.options import Options
from fastprompt.serving.http.state import Server

OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
OPEN_FOLDERS = ("/static/",)
UPLOADS = "/v1/prompts/"


class Gate:
    """Middleware that answers itself whatever must not reach a route.

    Semantics:
        a foreign host name or origin, where hosts are named    -> 403
        no valid key, except for what anybody may see           -> 401
        anything but a look, while the server drains            -> 503
        more requests than the key may send                     -> 429
        a body larger than its limit, as soon as that is known  -> 413; one that stops coming -> 408
        a route that raises what nobody expected                -> 500
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, answering = uuid.uuid4().hex, time.perf_counter(), False

        async def identified(message: Message) -> None:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self.server.metrics.answered(scope, message["status"], time.perf_counter() - started)
            await send(message)

        try:
            caller = self._admit(scope)
            body = Body(receive, scope, self.server.options)
        except ApiError as error:
            await reply(error)(scope, receive, identified)
            return
        state = scope.setdefault("state", {})
        state["caller"], state["request_id"] = caller, request_id
        working = not _open(scope["path"])
        self.server.active += working
        try:
            await self.app(scope, body, identified)
        except Exception as error:  # a fault of ours: answered and counted as all else
            if answering:
                raise
            await reply(explain(error))(scope, receive, identified)
        finally:
            self.server.active -= working

    def _admit(self, scope: Scope) -> Caller:
        headers, server = Headers(scope=scope), self.server
        check_origin(headers, server.options.hosts)
        if _open(scope["path"]) or (scope["path"] == "/metrics" and server.options.open_metrics):
            return ANYONE if server.access.open else Caller("nobody", admin=False)
        authorization = headers.get("authorization")
        caller = server.access.authenticate(authorization.encode("latin-1") if authorization else None)
        if caller is None:
            raise ApiError(
                401,
                "Incorrect API key provided: send a valid one as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if server.draining and scope["method"] not in ("GET", "HEAD"):
            raise unavailable("the server is shutting down")
        caller.limiter.take_request()
        return caller


class Body:
    """A request's body as it comes, counted and timed."""

    def __init__(self, receive: Receive, scope: Scope, options: Options) -> None:
        upload = scope["path"].startswith(UPLOADS)
        self.limit = options.max_upload_bytes if upload else options.max_body_bytes
        self._receive, self._stall = receive, options.stall_seconds
        self._read, self._whole = 0, False
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self.limit):
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            with fail_after(self._stall):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request's body stopped coming", headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._read > self.limit:
                error = self._too_large()
                raise HTTPException(error.status, str(error), headers=error.headers)
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self.limit} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDERS)


def check_origin(headers: Headers, hosts: frozenset[str] | None) -> None:
    """Refuse pages of other sites: a browser lets them send requests to this machine, and names resolve to anything."""
    if hosts is None:
        return
    named = [f"//{headers.get('host', '')}"] + ([headers["origin"]] if "origin" in headers else [])
    for address in named:
        try:
            host = urlsplit(address).hostname
        except ValueError:
            host = None
        if host not in hosts:
            raise ApiError(
                403,
                "this server has no keys and answers only to this machine: set keys to address it otherwise",
                code="foreign_host",
            )
