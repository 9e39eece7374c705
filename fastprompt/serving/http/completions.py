"""`/v1/completions`: texts, or token ids, continued."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import Response

from fastprompt.serving.http.answers import CompletionForm
from fastprompt.serving.http.body import Items, StrictRoute, TokenId
from fastprompt.serving.http.errors import invalid
from fastprompt.serving.http.sampling import SamplingFields, Unsupported
from fastprompt.serving.http.state import caller_of, find_prompt, need_ready, server_of
from fastprompt.serving.http.stream import Work, answer
from fastprompt.serving.http.texts import check_room, encode
from fastprompt.serving.request import MAX_LOGPROBS, Generation

DEFAULT_TOKENS = 16

router = APIRouter(tags=["completions"], route_class=StrictRoute, dependencies=[Depends(need_ready)])

Ids = Annotated[Items[TokenId], Field(min_length=1)]
MOST = 2048  # texts of a request, whatever the options say
Texts = (
    Annotated[Items[str], Field(min_length=1, max_length=MOST)]
    | Annotated[Items[Ids], Field(min_length=1, max_length=MOST)]
)


class CompletionRequest(SamplingFields):
    prompt: str | Ids | Texts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    echo: Unsupported = None
    suffix: Unsupported = None

    def texts(self, most: int) -> list[str] | list[list[int]]:
        """What to continue. Errors: ApiError for more than `most` of them."""
        prompt: Any = self.prompt
        listed = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if len(listed) > most:
            raise invalid(f"prompt has {len(listed)} texts, expected at most {most}: split the request", "prompt")
        return listed


@router.post(
    "/v1/completions",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue texts under the prompt that `model` names; the backbone's own name stands for no prompt."""
    server, caller, state = server_of(request), caller_of(request), request.state
    prompt = find_prompt(request, body.model)
    if body.best_of not in (None, body.n or 1):
        raise invalid("best_of other than n is not supported: ask for n choices", "best_of")
    include_usage = body.include_usage()
    params = body.params(body.max_tokens or DEFAULT_TOKENS, body.logprobs)
    texts = body.texts(server.options.max_texts)
    if len(texts) * params.n > server.options.max_choices:
        raise invalid(
            f"{len(texts)} texts with {params.n} choices each came, expected at most {server.options.max_choices} "
            "choices in all",
            "n",
        )
    engine: Any = server.engine
    ids: Any = texts
    if isinstance(texts[0], str):
        ids = await encode(engine.tokenizer, texts, server.longest_text)
    for text in ids:
        check_room(len(text), params.max_tokens, engine.limits.room(0), "prompt")
    reserved = caller.limiter.take_tokens(sum(map(len, ids)), len(ids) * params.n * params.max_tokens)
    work = Work(
        engine,
        [Generation(text, prompt, params, f"{state.request_id}-{i}") for i, text in enumerate(ids)],
        CompletionForm(state.request_id, body.model, server.vocabulary, body.logprobs is not None),
        caller.limiter,
        include_usage,
        server.options.stall_seconds,
        reserved,
    )
    return answer(work, body.stream)
