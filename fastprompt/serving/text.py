"""From tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastprompt.serving.request import Delta, TokenLogprob, Tokens

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_STEP = 16  # tokens without text after which only every 16th is looked at: what is behind is decoded again each time


class Pieces:
    """The text of one choice as it grows.

    Semantics:
        add(tokens)   the Delta to send now; None while the tokens end inside of a character or a possible stop string
        stopped       whether a stop string was found: the choice is over, and its row may be cancelled

    All pieces together are `tokenizer.decode` of all tokens, up to the first stop string. Two things cannot be had
    piece by piece: spaces that a tokenizer's `clean_up_tokenization_spaces` would take back stay, and bytes that are no
    character may show as other replacement characters.
    """

    def __init__(self, tokenizer: Any, index: int, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._tokenizer, self._index, self._stop, self._least = tokenizer, index, tuple(stop), min_tokens
        self._tokens: list[int] = []
        self._from = self._to = self._seen = 0  # tokens[from:to] gave text last, tokens[:seen] were looked at
        self._held = ""  # text that may be the beginning of a stop string
        self._new: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.stopped = False

    def add(self, tokens: Tokens) -> Delta | None:
        """Take new tokens or the row's end."""
        self._tokens += tokens.tokens
        self._new += tokens.tokens
        self._logprobs += tokens.logprobs
        reason = tokens.finish_reason
        text = self._held + self._decode(last=reason is not None)
        at, found = self._find(text)
        if found is not None:
            self.stopped = True
            return self._delta(text[:at], "stop", found)
        if reason is not None:
            special = tokens.stop_token if reason == "stop" else None
            return self._delta(text, reason, special)
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return self._delta(text[: len(text) - keep], None, None) if len(text) > keep else None

    def _decode(self, last: bool) -> str:
        """Text of the tokens that came; what a token says may depend on those just before it."""
        end = len(self._tokens)
        if end - self._to > _STEP > end - self._seen and not last:
            return ""
        self._seen = end
        before = self._text(self._from, self._to)
        both = self._text(self._from, end)
        if len(both) == len(before) or (both.endswith(_UNFINISHED) and not last):
            return ""
        self._from, self._to = self._to, end
        return both[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _find(self, text: str) -> tuple[int, str | None]:
        """Where the first stop string begins, and which it is; none counts before there are `min_tokens`."""
        if len(self._tokens) < self._least:
            return -1, None
        places = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(places) if places else (-1, None)

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0

    def _delta(self, text: str, reason: str | None, stop: str | int | None) -> Delta:
        delta = Delta(self._index, text, tuple(self._new), tuple(self._logprobs), reason, stop)
        self._new, self._logprobs = [], []
        return delta
