"""The dashboard at `/`: a static page, what it is made of, and the little it asks beside the API."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fastprompt.serving.http.errors import ApiError
from fastprompt.serving.http.state import caller_of, need_started, server_of

router = APIRouter(include_in_schema=False)

PAGE = "index.html"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page(request: Request) -> Response:
    """The page; it holds nothing of this server, which it asks for with the key that is entered in it."""
    return _serve(PAGE, request)


@router.get("/static/{name}")
async def asset(name: str, request: Request) -> Response:
    """A script, style sheet or picture of the page."""
    if name not in _assets():
        raise ApiError(404, "there is no such file", code="not_found")
    return _serve(name, request)


@router.get("/v1/dashboard", dependencies=[Depends(need_started)])
async def about(request: Request) -> dict[str, Any]:
    """What this server does, and what the key that asks may do."""
    server = server_of(request)
    engine: Any = server.engine
    return {
        "model": engine.name,
        "task": getattr(engine, "task", "text"),
        "chat": bool(getattr(engine.tokenizer, "chat_template", None)),
        "admin": caller_of(request).admin,
        "keys": not server.access.open,
        "pins": getattr(engine, "residency", None) is not None,
    }


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    """Content and ETag of each file that is served."""
    found = {}
    for entry in files(__package__).joinpath("static").iterdir():
        if entry.name.rpartition(".")[2] in _TYPES:
            content = entry.read_bytes()
            found[entry.name] = content, f'"{sha256(content).hexdigest()[:32]}"'
    return found


def _serve(name: str, request: Request) -> Response:
    content, tag = _assets()[name]
    headers = _HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
