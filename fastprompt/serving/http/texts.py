"""From what a client sends to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastprompt.serving.http.errors import ApiError, invalid

T = TypeVar("T")

SHORT = 8192  # characters: what takes about a millisecond is done on the event loop, more in a thread beside it

_thread = ThreadPoolExecutor(1, thread_name_prefix="fastprompt-tokenizer")


async def encode(tokenizer: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids of texts, with the tokenizer's special tokens as `tokenizer(text)` adds them.

    Errors: ApiError for a text of more than `longest` characters, which cannot have few enough tokens.
    """
    _check_length(max(map(len, texts)), longest, "prompt")
    return await _beside(sum(map(len, texts)), lambda: tokenizer(list(texts), verbose=False)["input_ids"])


async def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], longest: int) -> list[int]:
    """Token ids of a chat up to where the assistant begins, by the tokenizer's own template.

    Errors: ApiError where there is no template, where it refuses these messages, or for more than `longest` characters.
    """
    _check_length(sum(len(m["content"]) for m in messages), longest, "messages")
    if not getattr(tokenizer, "chat_template", None):
        raise invalid(
            "the backbone's tokenizer has no chat template: use /v1/completions, or give the tokenizer a template",
            "messages",
            "no_chat_template",
        )

    def apply() -> list[int]:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    try:
        return await _beside(sum(len(m["content"]) for m in messages), apply)
    except Exception as error:  # a template is a program of others that says no in its own ways
        raise invalid(f"the backbone's chat template refuses these messages: {error}"[:500], "messages") from None


def check_room(text: int, new: int, most: int, param: str) -> None:
    """Raise ApiError if a text and its answer are longer than a row may be."""
    if text + new > most:
        raise ApiError(
            400,
            f"This model's maximum context length is {most} tokens, virtual tokens not counted. The text has {text} "
            f"tokens and {new} are to be added: shorten the text, or ask for fewer.",
            code="context_length_exceeded",
            param=param,
        )


def _check_length(characters: int, longest: int, param: str) -> None:
    if characters > longest:
        raise ApiError(
            400,
            f"The text has {characters} characters, expected at most {longest}: shorten it.",
            code="context_length_exceeded",
            param=param,
        )


async def _beside(length: int, work: Callable[[], T]) -> T:
    if length <= SHORT:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_thread, work)
