"""`/v1/prompts` and `/v1/stats`: prompts listed, stored, replaced, removed and pinned, for administrators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from fastprompt.errors import BankFullError, PromptFileError, PromptNotFoundError
from fastprompt.serving.http.conditions import etag, must_be_new, unchanged, wanted_version
from fastprompt.serving.http.engine_metrics import stats_of
from fastprompt.serving.http.errors import ApiError, explain_upload
from fastprompt.serving.http.models import After, Limit, page_size
from fastprompt.serving.http.state import Server, need_admin, need_started, server_of
from fastprompt.serving.http.upload import Upload, read_upload
from fastprompt.serving.registry import PromptVersion

router = APIRouter(tags=["administration"], dependencies=[Depends(need_admin), Depends(need_started)])

Where = Callable[[PromptVersion], dict[str, Any]]
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/zip": BINARY,
            "application/x-tar": BINARY,
            "application/gzip": BINARY,
            "application/octet-stream": BINARY,
        },
    }
}


@router.get("/v1/prompts")
async def list_prompts(request: Request, after: After = None, limit: Limit = None) -> dict[str, Any]:
    """Prompts by name; one whose files are damaged has an `error`."""
    server = server_of(request)
    size = page_size(server, limit)
    names = server.engine.registry.names(after, size + 1)
    shown = names[:size]
    places = _where(server)
    data = await server.on_disk(lambda: [_shown(server, name, places) for name in shown])
    more = len(names) > size
    return {"object": "list", "data": data, "has_more": more, "last_id": shown[-1] if shown else None}


@router.get("/v1/prompts/{name}", response_class=Response)
async def get_prompt(name: str, request: Request) -> Response:
    """A prompt's description; its version is the ETag."""
    server = server_of(request)
    version = await server.on_disk(lambda: _current(server, name))
    headers = {"ETag": etag(version.version)}
    if unchanged(request.headers, version.version):
        return Response(status_code=304, headers=headers)
    return JSONResponse(_describe(version, _where(server)), headers=headers)


@router.put(
    "/v1/prompts/{name}",
    response_class=Response,
    openapi_extra=UPLOAD,
    responses={201: {"description": "Stored under a free name."}, 412: {"description": "Another version is there."}},
)
async def put_prompt(name: str, request: Request) -> Response:
    """Store or replace a prompt: a form of its files, or an archive; `If-Match` and `If-None-Match: *` are kept to."""
    server = server_of(request)
    if name == server.engine.name:
        raise ApiError(409, f"{name[:200]!r} is the backbone's own name: choose another", code="name_taken")
    new = must_be_new(request.headers)
    async with server.uploads:
        upload = await read_upload(request)
        existed, version = await server.on_disk(lambda: _put(server, name, upload, request, new))
    server.engine.residency.drop(name)
    return JSONResponse(_describe(version, _where(server)), 200 if existed else 201, {"ETag": etag(version.version)})


@router.delete("/v1/prompts/{name}", status_code=204, response_class=Response)
async def delete_prompt(name: str, request: Request) -> Response:
    """Remove a prompt; requests that run under it finish."""
    server = server_of(request)

    def delete() -> None:
        registry = server.engine.registry
        try:
            registry.delete(name, if_match=wanted_version(request.headers, registry, name))
        except PromptFileError as error:
            raise explain_upload(error) from error

    try:
        await server.on_disk(delete)
    except PromptNotFoundError:
        raise _missing(name) from None
    server.engine.residency.drop(name)
    return Response(status_code=204)


@router.post("/v1/prompts/{name}/pin")
async def pin_prompt(name: str, request: Request) -> dict[str, Any]:
    """Bring a prompt onto the device, and keep it and the versions that follow it there."""
    server = server_of(request)
    await server.on_disk(lambda: _current(server, name))
    try:
        server.engine.residency.pin(name)
    except BankFullError as error:
        raise ApiError(409, str(error), code="bank_full") from error
    return {"name": name, "pinned": True}


@router.post("/v1/prompts/{name}/unpin")
async def unpin_prompt(name: str, request: Request) -> dict[str, Any]:
    """Let a prompt be evicted again."""
    with suppress(PromptNotFoundError):  # it is not pinned
        server_of(request).engine.residency.unpin(name)
    return {"name": name, "pinned": False}


@router.post("/v1/prompts/{name}/unload")
async def unload_prompt(name: str, request: Request) -> dict[str, Any]:
    """Take a prompt out of memory; rows that read it finish, and it comes back when it is next asked for."""
    server = server_of(request)
    await server.on_disk(lambda: _current(server, name))
    server.engine.residency.unload(name)
    return {"name": name, "unloaded": True}


@router.get("/v1/stats")
async def stats(request: Request) -> dict[str, Any]:
    """The engine's numbers, by prompt too, and times of the last requests; the bare backbone goes by its name."""
    server = server_of(request)
    bare = server.engine.name
    return {
        "model": bare,
        "prompts": len(server.engine.registry),
        "ready": server.ready,
        "recent": server.metrics.recent(),
        "engine": _keyed(stats_of(server.engine), bare),
    }


def _put(server: Server, name: str, upload: Upload, request: Request, new: bool) -> tuple[bool, PromptVersion]:
    registry = server.engine.registry
    match = wanted_version(request.headers, registry, name)
    existed = name in registry
    try:
        put: Any = registry.put_archive if isinstance(upload, bytes) else registry.put
        return existed, put(name, upload, if_match=match, if_none_match=new)
    except PromptNotFoundError:
        raise ApiError(412, f"there is no prompt {name[:200]!r}", code="precondition_failed") from None
    except PromptFileError as error:
        raise explain_upload(error) from error


def _current(server: Server, name: str) -> PromptVersion:
    try:
        return server.engine.registry.current(name)
    except PromptNotFoundError:
        raise _missing(name) from None
    except PromptFileError as error:
        raise ApiError(409, str(error), code="prompt_unreadable") from error


def _missing(name: str) -> ApiError:
    return ApiError(404, f"there is no prompt {name[:200]!r}", code="prompt_not_found", param="name")


def _where(server: Server) -> Where:
    """What tells a version's `tier` at this moment, and whether its prompt is pinned."""
    residency = server.engine.residency
    pinned = residency.pinned()
    return lambda version: {"tier": residency.tier(version.version), "pinned": version.name in pinned}


def _shown(server: Server, name: str, places: Where) -> dict[str, Any]:
    try:
        return _describe(_current(server, name), places)
    except ApiError as error:
        return {"name": name, "error": str(error)}


def _describe(version: PromptVersion, places: Where) -> dict[str, Any]:
    shown = asdict(version)
    del shown["folder"]
    return {"object": "prompt"} | shown | places(version)


def _keyed(values: Any, bare: str) -> Any:
    """JSON's names are strings: None is the bare backbone."""
    if isinstance(values, dict):
        return {bare if k is None else str(k): _keyed(v, bare) for k, v in values.items()}
    return list(values) if isinstance(values, tuple) else values
