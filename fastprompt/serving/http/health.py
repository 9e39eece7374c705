"""Whether the server lives, whether it takes requests, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from fastprompt.serving.http.errors import denied, unavailable
from fastprompt.serving.http.state import caller_of, server_of

router = APIRouter(tags=["health"])


@router.get("/health", responses={503: {"description": "The engine is dead."}})
async def health(request: Request) -> dict[str, Any]:
    """Whether the process is worth keeping: 503 once the engine has died."""
    if not server_of(request).alive:
        raise unavailable("the engine has stopped")
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "The engine loads, drains or is dead."}})
async def ready(request: Request) -> dict[str, Any]:
    """Whether requests should come here."""
    if not server_of(request).ready:
        raise unavailable("the engine is not ready")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus metrics, for administrators unless the server was told to show them to anybody."""
    server = server_of(request)
    if not (server.options.open_metrics or caller_of(request).admin):
        raise denied()
    return Response(server.metrics.page(), media_type=CONTENT_TYPE_LATEST)
