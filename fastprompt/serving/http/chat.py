"""`/v1/chat/completions`: a chat's next message, by the tokenizer's chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field, field_validator
from starlette.responses import Response

from fastprompt.serving.http.answers import ChatForm
from fastprompt.serving.http.body import Items, Strict, StrictRoute
from fastprompt.serving.http.errors import invalid
from fastprompt.serving.http.sampling import MAX_TOKENS, Ignored, SamplingFields, Unsupported
from fastprompt.serving.http.state import Server, caller_of, find_prompt, need_ready, server_of
from fastprompt.serving.http.stream import Work, answer
from fastprompt.serving.http.texts import check_room, encode_chat
from fastprompt.serving.request import MAX_LOGPROBS, Generation

router = APIRouter(tags=["chat"], route_class=StrictRoute, dependencies=[Depends(need_ready)])


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[TextPart] | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    refusal: Ignored = None
    tool_call_id: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None

    def plain(self) -> dict[str, Any]:
        """The message as templates read it."""
        parts = self.content
        content = "".join(part.text for part in parts) if isinstance(parts, list) else parts or ""
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(SamplingFields):
    messages: Annotated[Items[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Any = None
    modalities: Any = None
    parallel_tool_calls: Ignored = None
    tools: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Unsupported = None
    function_call: Literal["none", "auto"] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    web_search_options: Unsupported = None

    @field_validator("response_format")
    @classmethod
    def _text(cls, form: Any) -> Any:
        if form not in (None, {"type": "text"}):
            raise ValueError("only {'type': 'text'} is supported")
        return form

    @field_validator("modalities")
    @classmethod
    def _only_text(cls, modalities: Any) -> Any:
        if modalities not in (None, ["text"]):
            raise ValueError("only ['text'] is supported")
        return modalities

    def best(self) -> int | None:
        """How many log-probabilities of other tokens to give; None for none at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is allowed only where logprobs is true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a chat under the prompt that `model` names; the backbone's own name stands for no prompt."""
    server, caller, state = server_of(request), caller_of(request), request.state
    prompt = find_prompt(request, body.model)
    best, include_usage = body.best(), body.include_usage()
    if len(body.messages) > server.options.max_messages:
        raise invalid(f"{len(body.messages)} messages came, expected at most {server.options.max_messages}", "messages")
    engine: Any = server.engine
    ids = await encode_chat(engine.tokenizer, [message.plain() for message in body.messages], server.longest_text)
    wanted = body.max_completion_tokens or body.max_tokens
    check_room(len(ids), wanted or 1, engine.limits.room(0), "messages")
    params = body.params(wanted or _rest(server, prompt, len(ids)), best)
    reserved = caller.limiter.take_tokens(len(ids), params.n * params.max_tokens)
    work = Work(
        engine,
        [Generation(ids, prompt, params, f"{state.request_id}-0")],
        ChatForm(state.request_id, body.model, server.vocabulary, bool(body.logprobs)),
        caller.limiter,
        include_usage,
        server.options.stall_seconds,
        reserved,
    )
    return answer(work, body.stream)


def _rest(server: Server, prompt: str | None, text: int) -> int:
    """Tokens that fit behind a text: virtual tokens take room too."""
    engine: Any = server.engine
    virtual = 0 if prompt is None else engine.registry.current(prompt).length
    return max(1, engine.limits.room(virtual) - text)
