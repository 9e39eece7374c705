"""What a client asks for, checked, and what it is answered with."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastprompt.errors import ArgumentError, FastPromptError

MAX_STOPS = 32
MAX_STOP_LENGTH = 1024  # characters of a stop string
MAX_LOGPROBS = 20
MAX_CHOICES = 64
COLDEST = 1e-5  # below this temperature float32 logits overflow before any second token gets a chance


class OverloadedError(FastPromptError, RuntimeError):
    """No room for another request now; `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RowFailedError(FastPromptError, RuntimeError):
    """The backbone has no usable answer to a row: its numbers are not finite, or its prompt cannot run.

    No other row is concerned, and the same row would fail again until the prompt is stored anew.
    """


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a row ends.

    Semantics, on a row's float32 logits, by transformers' logits processors in this order:
        logit_bias; repetition_penalty (of tokens of the text too); frequency_penalty and presence_penalty (of generated
        tokens only); min_tokens;
        temperature 0 (or below 1e-5) takes the maximum; else temperature, top_k, top_p, min_p, and one draw

    `seed` makes a row's draws reproducible whatever runs beside it. `stop` ends a row before the string,
    `stop_token_ids` and the end-of-sequence tokens (unless `ignore_eos`) before the token. `logprobs` asks for the
    log-probabilities of each token and of that many best ones, under the model alone: before any of the above. `n` rows
    answer the same text.
    Raises ArgumentError for values outside their range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, None)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _whole("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_below=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, value in self.logit_bias.items():
            _whole("a token of logit_bias", token, 0, None)
            _number(f"logit_bias of token {token}", value, -100.0, 100.0)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _whole("n", self.n, 1, MAX_CHOICES)
        self._check_stops()

    def _check_stops(self) -> None:
        if isinstance(self.stop, str) or any(not isinstance(s, str) or not s for s in self.stop):
            raise ArgumentError(f"stop is {_short(self.stop)}, expected a list of strings that are not empty")
        if len(self.stop) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise ArgumentError(
                f"stop has {len(self.stop)} strings, the longest of {max(map(len, self.stop))} characters, expected at "
                f"most {MAX_STOPS} of at most {MAX_STOP_LENGTH}"
            )
        if len(self.stop_token_ids) > MAX_STOPS:
            raise ArgumentError(f"stop_token_ids has {len(self.stop_token_ids)} entries, expected at most {MAX_STOPS}")
        for token in self.stop_token_ids:
            _whole("an entry of stop_token_ids", token, 0, None)

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


@dataclass(frozen=True)
class Generation:
    """A request: continue `token_ids` (the text, without virtual tokens) under a prompt; None is the bare backbone."""

    token_ids: Sequence[int]
    prompt: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability, and those of the best tokens as pairs (token, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """New tokens of choice `index` of a request, as the engine says them: after a step that gave it some, or its end.

    `finish_reason` is None while the row runs, then "stop", "length", "abort" (cancelled) or "error" with `error`
    saying why. A token that ended the row is not among `tokens`; `stop_token` says which of `stop_token_ids` it was.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_token: int | None = None
    error: FastPromptError | None = None


@dataclass(frozen=True)
class Delta:
    """What a client gets: the next piece of choice `index`'s text, with the tokens that came since the last piece.

    `text` never ends inside of a character or of what may become a stop string. `stop_reason` is the stop string or
    token that ended the choice, None for an end-of-sequence token or a length.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Finished:
    """A request that ended; times in seconds, `time_to_first_token` None if it never had one."""

    prompt: str | None
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float | None
    seconds: float
    finish_reason: str


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ArgumentError(f"{name} is {_short(value)}, expected a whole number of at least {low}{upper}")


def _number(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_below and value == low):  # type: ignore[operator]
        border = "above" if open_below else "from"
        raise ArgumentError(f"{name} is {_short(value)}, expected a number {border} {low:g} to {high:g}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
