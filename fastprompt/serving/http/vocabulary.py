"""Single tokens as text and bytes, for log-probabilities."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What each token of a tokenizer stands for.

    Semantics:
        text(token)      # "Ġthe" -> " the", "▁the" -> " the"; "bytes:\\xc3" for a part of a character
        data(token)      # the bytes themselves
        longest          # characters that one token may stand for
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._from_character = _byte_alphabet() if _byte_level(tokenizer) else None
        self._special = set(tokenizer.all_special_ids)
        self.data = lru_cache(maxsize=65536)(self._data)

    @cached_property
    def longest(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def text(self, token: int) -> str:
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _data(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding table that the tokenizer has no token for
            return b""
        if token in self._special:
            return piece.encode()
        table = self._from_character
        if table is not None:
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


def _byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary is spelt in the alphabet of byte-level BPE, where a space is a `Ġ`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in str(getattr(backend, "decoder", ""))


def _byte_alphabet() -> dict[str, int]:
    """Character to byte: printable ones stand for themselves, the others for those from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
