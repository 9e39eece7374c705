"""From labels of tokens to labels of words, and from those to the spans they mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from fastprompt.errors import ArgumentError, UnsupportedError

OUTSIDE = "O"


@dataclass(frozen=True)
class Word:
    """Characters `start` to `end` of a text; `token` is the first one of its tokens."""

    start: int
    end: int
    token: int


@dataclass(frozen=True)
class Span:
    """Words `first` to `last`, the last one included, that a label names."""

    label: str
    first: int
    last: int


def join(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Words as a text, one space between two of them as in training, and where each of them stands in it."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), places


def given_words(encoding: Any, places: Sequence[tuple[int, int]]) -> list[Word]:
    """The first token of each of a text's words, which stand at `places`.

    Args:
        encoding: one text's, of a fast tokenizer, with offsets.
    Errors: ArgumentError for a word without tokens.
    """
    found: dict[int, int] = {}
    owner = [i for i, (start, end) in enumerate(places) for _ in range(start, end + 1)]  # of each character
    for token, (start, end) in enumerate(encoding.offsets):
        if end > start:
            found.setdefault(owner[end - 1], token)
    if missing := [i for i in range(len(places)) if i not in found]:
        raise ArgumentError(f"word {missing[0]} has no tokens, or was cut off: remove it, or send fewer words")
    return [Word(start, end, found[i]) for i, (start, end) in enumerate(places)]


def found_words(encoding: Any, text: str) -> list[Word]:
    """The words that the tokenizer sees in a text: punctuation is one, with most tokenizers."""
    words = []
    tokens = [(word, i) for i, word in enumerate(encoding.word_ids) if word is not None]
    for _, group in groupby(tokens, key=lambda pair: pair[0]):
        own = [i for _, i in group]
        start, end = encoding.offsets[own[0]][0], encoding.offsets[own[-1]][1]
        piece = text[start:end]
        start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
        if end > start:
            words.append(Word(start, end, own[0]))
    return words


def need_fast(tokenizer: Any) -> None:
    """Raise for a tokenizer that does not know the words of its tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in a text: serve with a fast tokenizer"
        )


def spans(labels: Sequence[str]) -> list[Span]:
    """What IOB labels of consecutive words mark.

    Semantics (as seqeval and conlleval read them):
        O              outside
        B-x            a span of x begins
        I-x            goes on with a span of x, or begins one where none runs
        x, no prefix   as I-x
    """
    found: list[Span] = []
    running: tuple[str, int] | None = None
    for i, label in enumerate([*labels, OUTSIDE]):
        begins, kind = _read(label)
        if running is not None and (kind != running[0] or begins):
            found.append(Span(running[0], running[1], i - 1))
            running = None
        if kind is not None and running is None:
            running = kind, i
    return found


def _read(label: str) -> tuple[bool, str | None]:
    """Whether a label begins a span whatever came before, and the span's kind; None is outside."""
    if label == OUTSIDE:
        return False, None
    prefix, dash, kind = label.partition("-")
    return (prefix == "B", kind) if dash and prefix in ("B", "I") else (False, label)


def probabilities(logits: np.ndarray, activation: str) -> np.ndarray:
    """Probabilities `[..., C]` of logits under "softmax" or "sigmoid"; the logits themselves for "none"."""
    return _ACTIVATIONS[activation](logits.astype(np.float64))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": _softmax,
    "sigmoid": lambda logits: 0.5 * (1.0 + np.tanh(0.5 * logits)),
    "none": lambda logits: logits,
}
