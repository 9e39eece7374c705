"""What completions and chats have in common: how tokens are chosen, and what OpenAI's clients may send besides."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from fastprompt.serving.http.body import Items, Penalty, Share, Strict, TokenId
from fastprompt.serving.http.errors import invalid
from fastprompt.serving.request import MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

MAX_BIAS = 1024  # tokens of a logit_bias
MAX_TOKENS = 10_000_000
MAX_NAME = 400  # characters of a model's name

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _nothing(value: Any) -> Any:
    """Take only what changes nothing: what this server cannot do is refused, not ignored."""
    if value not in (None, [], {}, "", False):
        raise ValueError("this server does not support it: leave it out")
    return None


Stops = Annotated[Items[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_listed)]
Unsupported = Annotated[Any, AfterValidator(_nothing)]
Ignored = Annotated[Any, Field(description="Accepted without effect.")]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingFields(Strict):
    """OpenAI's fields, then vLLM's, then those that change no answer here."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_STOPS)] | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_ids(cls, bias: Any) -> Any:
        if not isinstance(bias, dict):
            return bias
        if len(bias) > MAX_BIAS:
            raise ValueError(f"{len(bias)} tokens came, expected at most {MAX_BIAS}")
        for token in bias:
            if not (token.isascii() and token.isdecimal() and len(token) <= 10):
                raise ValueError(f"{token[:40]!r} came, expected token ids")
        return bias

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How the engine is to choose. Errors: ArgumentError for fields that do not go together."""
        given: dict[str, Any] = {
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "seed": self.seed,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "n": self.n,
        }
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, **{k: v for k, v in given.items() if v is not None}
        )

    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage. Errors: ApiError for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is allowed only where stream is true", "stream_options")
        return self.stream_options is not None and self.stream_options.include_usage
