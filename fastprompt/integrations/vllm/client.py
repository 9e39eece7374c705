"""vLLM's engine as its HTTP handlers see it, with prompts put before what they send and taken off what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastprompt.integrations.vllm.tickets import Seal, Ticket, placeholders
from fastprompt.serving.http.access import ANYONE, Caller
from fastprompt.serving.http.errors import ApiError, invalid

TRANSFER = "kv_transfer_params"  # a client's own would be read by vLLM's other connectors


@dataclass(frozen=True)
class Asked:
    """What the HTTP request under way asks for: a model by name, a ticket unless it is the bare backbone, by whom."""

    model: str
    ticket: Ticket | None
    caller: Caller


ASKED: ContextVar[Asked | None] = ContextVar("fastprompt_vllm_asked", default=None)


class PromptedClient:
    """An engine client that puts the prompt of the request under way before its tokens.

    Semantics, of `generate(prompt, params, ...)`:
        prompt_token_ids = placeholders + prompt_token_ids;  cache_salt = seal.salt(ticket, the client's own)
        params without kv_transfer_params;  max_tokens and min_tokens no more than there is room for
        outputs without the placeholders: what they say of prompt tokens, and of cached ones, is about the text
    Everything else is the engine client's own.
    """

    def __init__(self, client: Any, seal: Seal, ids: tuple[int, ...]) -> None:
        self._client, self._seal, self._ids = client, seal, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        """As the engine client's; what is asked for is looked up now, while the HTTP request is in hand."""
        return self._generate(prompt, params, request_id, ASKED.get(), options)

    async def _generate(
        self, prompt: Any, params: Any, request_id: str, asked: Asked | None, options: dict[str, Any]
    ) -> AsyncIterator[Any]:
        params, text = _without_transfer(params), _token_ids(prompt)
        ticket, caller = (None, ANYONE) if asked is None else (asked.ticket, asked.caller)
        prompt, params = self._stood_behind(prompt, params, text, ticket)
        reserved = caller.limiter.take_tokens(len(text), (params.n or 1) * (params.max_tokens or 0))
        written = 0
        try:
            async for output in self._client.generate(prompt, params, request_id, **options):
                written += sum(len(choice.token_ids) for choice in output.outputs)
                if ticket is not None:
                    _take_off(output, ticket.length)
                yield output
        finally:
            caller.limiter.settle(reserved, len(text) + written)

    def _stood_behind(self, prompt: Any, params: Any, text: list[int], ticket: Ticket | None) -> tuple[Any, Any]:
        own = prompt.get("cache_salt")
        if ticket is None:
            return (prompt if own is None else {**prompt, "cache_salt": self._seal.client_salt(own)}), params
        if prompt.get("type", "token") != "token" or not text:
            raise invalid("under a prompt there must be a text of one token at least, and no images or embeddings")
        room = self._client.model_config.max_model_len - ticket.length - len(text)
        if room < 1:
            longest = self._client.model_config.max_model_len
            raise invalid(
                f"the text has {len(text)} tokens and its prompt {ticket.length}, the model takes {longest} with the "
                "answer: shorten the text",
                code="context_length_exceeded",
            )
        params.max_tokens = min(params.max_tokens or room, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)  # vLLM never ends a row that has had fewer
        ids = [*placeholders(ticket, self._ids), *text]
        return {**prompt, "prompt_token_ids": ids, "cache_salt": self._seal.salt(ticket, own)}, params


def _token_ids(prompt: Any) -> list[int]:
    return list(prompt.get("prompt_token_ids") or ())


def _without_transfer(params: Any) -> Any:
    """A copy of sampling parameters without what a client says about the transfer of pages."""
    params = params.clone()
    if params.extra_args:
        params.extra_args = {name: value for name, value in params.extra_args.items() if name != TRANSFER} or None
    return params


def _take_off(output: Any, length: int) -> None:
    """Let an output speak of the text alone. Errors: ApiError for a request that has failed."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = output.prompt_token_ids[length:]
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - length)
    if any(choice.finish_reason == "error" for choice in output.outputs):
        raise ApiError(503, "this prompt's files cannot be read at present", code="prompt_unreadable", param="model")


def refuse_unsupported(request: Any) -> None:
    """Raise ApiError for a request that a prompt cannot be right under, as vLLM would answer it."""
    if getattr(request, "echo", False):
        raise invalid("echo is not supported under a prompt: it has no text", "echo")
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(request, name, None) is not None:
            raise invalid(f"{name} is not supported under a prompt: its virtual tokens have none", name)
    if getattr(request, "use_beam_search", False):
        raise invalid("beam search is not supported under a prompt: vLLM would leave the prompt out", "use_beam_search")
    if getattr(request, "prompt_embeds", None) is not None:
        raise invalid("prompt_embeds are not supported under a prompt: send text or token ids", "prompt_embeds")
