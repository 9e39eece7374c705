"""`/v1/models`: what a key may name as `model`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from fastprompt.errors import PromptFileError, PromptNotFoundError
from fastprompt.serving.http.access import Caller
from fastprompt.serving.http.state import Server, caller_of, find_prompt, need_started, server_of
from fastprompt.serving.registry import PromptRegistry

OWNER = "fastprompt"
SCANNED = 1000  # names looked at between two turns of the event loop

router = APIRouter(tags=["models"], dependencies=[Depends(need_started)])

After = Annotated[str | None, Query(max_length=400, description="Names behind this one.")]
Limit = Annotated[int | None, Query(ge=1, description="How many at most.")]


@router.get("/v1/models")
async def list_models(request: Request, after: After = None, limit: Limit = None) -> dict[str, Any]:
    """The backbone and the prompts this key may use, by name; `has_more` where `after=last_id` gives others."""
    server, caller = server_of(request), caller_of(request)
    size = page_size(server, limit)
    bare = [server.engine.name] if after is None and caller.may_use(server.engine.name) else []
    prompts = await allowed_names(server, caller, after, size + 1 - len(bare))
    shown = (bare + prompts)[:size]
    created = await server.on_disk(lambda: _created(server.engine.registry, shown[len(bare) :]))
    models = [_model(server, name, made) for name, made in zip(shown, [0] * len(bare) + created, strict=True)]
    return {
        "object": "list",
        "data": models,
        "has_more": len(bare) + len(prompts) > size,
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """One model; 404 for what is not there or not this key's."""
    server = server_of(request)
    prompt = find_prompt(request, name)
    made = [0] if prompt is None else await server.on_disk(lambda: _created(server.engine.registry, [prompt]))
    return _model(server, name, made[0])


def page_size(server: Server, limit: int | None) -> int:
    """How many names a list has at most."""
    return min(limit or server.options.page, server.options.max_page)


async def allowed_names(server: Server, caller: Caller, after: str | None, count: int) -> list[str]:
    """The first `count` names behind `after` that a caller may use; the event loop has its turns in between."""
    registry, found = server.engine.registry, list[str]()
    while len(found) < count:
        names = registry.names(after, SCANNED)
        found += [name for name in names if caller.may_use(name) and name != server.engine.name]
        if len(names) < SCANNED:
            break
        after = names[-1]
        await asyncio.sleep(0)
    return found[:count]


def _created(registry: PromptRegistry, names: Sequence[str]) -> list[int]:
    """When prompts were stored, in seconds since 1970; 0 for those that are not there."""
    found = []
    for name in names:
        try:
            found.append(int(registry.created(name)))
        except (PromptNotFoundError, PromptFileError):
            found.append(0)
    return found


def _model(server: Server, name: str, created: int) -> dict[str, Any]:
    root = server.engine.name
    parent = None if name == root else root
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER, "root": root, "parent": parent}
