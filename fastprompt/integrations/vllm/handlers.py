"""vLLM's handlers of completions and chats, with `model` naming prompts."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

from fastprompt.errors import PromptNotFoundError
from fastprompt.integrations.vllm.client import ASKED, Asked, PromptedClient, refuse_unsupported
from fastprompt.integrations.vllm.store import PrefixStore
from fastprompt.serving.http.access import ANYONE
from fastprompt.serving.http.errors import not_found


class PromptedModels:
    """vLLM's list of models, on which the prompt that is asked for stands too, under the name it was asked by."""

    def __init__(self, models: Any) -> None:
        self._models = models

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    def is_base_model(self, name: str) -> bool:
        asked = ASKED.get()
        return (asked is not None and name == asked.model) or self._models.is_base_model(name)

    def model_name(self, *args: Any) -> str:
        asked = ASKED.get()
        return self._models.model_name(*args) if asked is None else asked.model


class PromptedHandler:
    """One of vLLM's handlers whose `create` method answers under the prompt that `request.model` names.

    Semantics:
        404 for a name that is not there, or not this key's;  400 for what no prompt can be right under
        else `create(request, raw_request)` of a copy whose engine client puts the prompt before the text
    """

    def __init__(self, handler: Any, create: str, store: PrefixStore, client: PromptedClient) -> None:
        self._handler = copy.copy(handler)
        self._handler.engine_client = client
        self._handler.models = PromptedModels(handler.models)
        self._bare, self._store, self._create = handler.models, store, create

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handler, name)
        return self._prompted(found) if name == self._create else found

    def _prompted(self, create: Callable[..., Any]) -> Callable[..., Any]:
        async def prompted(request: Any, raw_request: Any = None) -> Any:
            before = ASKED.set(await self._asked(request, raw_request))
            try:
                return await create(request, raw_request)
            finally:
                ASKED.reset(before)

        return prompted

    async def _asked(self, request: Any, raw_request: Any) -> Asked:
        caller = getattr(raw_request.state, "caller", ANYONE) if raw_request is not None else ANYONE
        name = request.model or self._bare.model_name()
        request.kv_transfer_params = None
        allowed, bare, ticket = caller.may_use(name), self._bare.is_base_model(name), None
        if not bare:
            try:
                ticket = (await asyncio.to_thread(self._store.current, name)).ticket
            except PromptNotFoundError:
                allowed = False
        if not allowed:
            raise not_found(name)
        if ticket is not None:
            refuse_unsupported(request)
        return Asked(name, ticket, caller)
