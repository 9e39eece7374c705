"""What completions and chats are answered with: one object, or chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastprompt.serving.http.vocabulary import Vocabulary
from fastprompt.serving.request import Delta, TokenLogprob

LOWEST = -9999.0  # JSON has no infinity


@dataclass
class Choice:
    """One choice as it grows; `offset` counts the characters of tokens whose log-probabilities were sent."""

    text: str = ""
    tokens: int = 0
    offset: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += len(delta.tokens)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason


class Form(ABC):
    """The shape of an answer: `whole` at once, or `opening`, `chunk` by chunk and `closing` usage."""

    def __init__(self, request_id: str, model: str, vocabulary: Vocabulary, logprobs: bool) -> None:
        self.model, self.vocabulary, self.logprobs = model, vocabulary, logprobs
        self.id = f"{self.prefix}-{request_id}"
        self.created = int(time.time())

    prefix: str
    whole_kind: str
    chunk_kind: str

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        made = [self.choice(i, c) for i, c in enumerate(choices)]
        return self._envelope(self.whole_kind, made) | {"usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What precedes a choice's first chunk."""
        return None

    def chunk(self, index: int, delta: Delta, choice: Choice) -> dict[str, Any]:
        return self._envelope(self.chunk_kind, [self.part(index, delta, choice)])

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._envelope(self.chunk_kind, []) | {"usage": usage}

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice that is complete."""

    @abstractmethod
    def part(self, index: int, delta: Delta, choice: Choice) -> dict[str, Any]:
        """What a choice has more of."""

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class CompletionForm(Form):
    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.logprobs, Choice())
        return _choice(index, logprobs, choice.finish_reason, choice.stop_reason) | {"text": choice.text}

    def part(self, index: int, delta: Delta, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logprobs, choice)
        return _choice(index, logprobs, delta.finish_reason, delta.stop_reason) | {"text": delta.text}

    def _logprobs(self, found: Sequence[TokenLogprob], choice: Choice) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokens = [self.vocabulary.text(f.token) for f in found]
        offsets = []
        for text in tokens:
            offsets.append(choice.offset)
            choice.offset += len(text)
        best: list[dict[str, float]] = []
        for f in found:  # several tokens may have one text: the likeliest stands for it
            named: dict[str, float] = {}
            for token, logprob in (*f.top, (f.token, f.logprob)):
                named.setdefault(self.vocabulary.text(token), max(logprob, LOWEST))
            best.append(named)
        return {
            "tokens": tokens,
            "token_logprobs": [max(f.logprob, LOWEST) for f in found],
            "top_logprobs": best,
            "text_offset": offsets,
        }


class ChatForm(Form):
    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        first = {"role": "assistant", "content": ""}
        return self._envelope(self.chunk_kind, [_choice(index, None, None, None) | {"delta": first}])

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs)
        return _choice(index, logprobs, choice.finish_reason, choice.stop_reason) | {"message": message}

    def part(self, index: int, delta: Delta, choice: Choice) -> dict[str, Any]:
        more = {"content": delta.text} if delta.text else {}
        return _choice(index, self._logprobs(delta.logprobs), delta.finish_reason, delta.stop_reason) | {"delta": more}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [self._token(f.token, f.logprob) | {"top_logprobs": [self._token(*t) for t in f.top]} for f in found]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self.vocabulary.data(token))
        return {"token": self.vocabulary.text(token), "logprob": max(logprob, LOWEST), "bytes": data}


def _choice(index: int, logprobs: Any, finish: str | None, stop: str | int | None) -> dict[str, Any]:
    made = {"index": index, "logprobs": logprobs, "finish_reason": finish}
    return made | {"stop_reason": stop} if finish is not None else made


def usage_of(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens read, the virtual ones not counted, and written."""
    written = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
