"""Which of vLLM's own endpoints a key opens: its server has many, and keys here are for prompts."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from fastprompt.serving.http.errors import ApiError, denied, not_found, reply
from fastprompt.serving.http.gate import OPEN
from fastprompt.serving.http.state import Server

PROMPTED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/prompts"})
PROMPTED_FOLDERS = ("/v1/models/", "/v1/prompts/")  # each looks at the key itself
UNCOUNTED = frozenset({"/v1/responses", "/v1/messages"})  # vLLM's own write as they like
BARE = UNCOUNTED | {"/tokenize", "/detokenize", "/version"}


class Paths:
    """Middleware behind the gate, which has said whose key it is.

    Semantics:
        completions, chats, models, prompts     as their routes say
        what the backbone alone answers         for keys that may use it; what writes texts, without a limit of tokens
        anything else                           for administrators; metrics as the server was told
        websockets                              closed: nobody has looked at their keys, or where they come from
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._refusal(scope) if scope["type"] == "http" else None
        await (self.app if error is None else reply(error))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path, caller = scope["path"], scope["state"]["caller"]
        if path in PROMPTED or path in OPEN or path.startswith(PROMPTED_FOLDERS) or caller.admin:
            return None
        if path == "/metrics" and self.server.options.open_metrics:
            return None
        if path in UNCOUNTED and caller.limiter.tokens is not None:
            return ApiError(
                403,
                "This key has a limit of tokens, which are not counted here: use /v1/completions or "
                "/v1/chat/completions.",
                code="permission_denied",
            )
        if path in BARE:
            return None if caller.may_use(self.server.engine.name) else not_found()
        return denied()
