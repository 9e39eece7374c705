"""Texts of an encoder's requests to token ids, so that no request holds up the others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

from fastprompt.errors import ArgumentError

PART = 2**16  # characters that are tokenized at a time
_TOKEN = 16  # characters of a token, generously


class Texts:
    """A tokenizer in a thread of its own, which takes a part of a request's texts after the other.

    `longest` is the most tokens that a text may have.
    """

    def __init__(self, tokenizer: Any, thread: Executor, longest: int) -> None:
        self._tokenizer, self._thread = tokenizer, thread
        self._characters = max(PART, _TOKEN * longest)

    async def encode(self, texts: Sequence[str], most: int | None = None) -> list[Any]:
        """The tokenizer's encodings of some texts after the other; of each text `most` tokens, cut at its end.

        Errors: ArgumentError without a tokenizer, and for a text that has far too many characters and is not to be cut.
        """
        if self._tokenizer is None:
            raise ArgumentError("this server has no tokenizer: send token ids")
        longest = max(map(len, texts))
        if most is None and longest > self._characters:
            raise ArgumentError(f"a text has {longest} characters, expected at most {self._characters}: cut it")
        cut = {} if most is None else {"truncation": True, "max_length": most}
        encodings, loop = [], asyncio.get_running_loop()
        for part in _parts([text[: self._characters] for text in texts]):
            encode = partial(self._tokenizer, part, verbose=False, **cut)
            encodings.append(await loop.run_in_executor(self._thread, encode))
        return encodings


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, those together that have at most `PART` characters in all."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > PART:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    yield part
