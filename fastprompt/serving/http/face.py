"""What the server asks of an engine; `AsyncEngine` and `EncoderEngine` are the two there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fastprompt.serving.registry import PromptRegistry
    from fastprompt.serving.request import Delta, Generation


class Limits(Protocol):
    """A row has at most `max_model_len` tokens: text, answer and virtual ones."""

    @property
    def max_model_len(self) -> int: ...
    def room(self, virtual: int) -> int:
        """Tokens of text and answer together, behind so many virtual ones."""


class Finished(Protocol):
    """A request that came to its end; times in seconds."""

    @property
    def prompt(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def time_to_first_token(self) -> float | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def finish_reason(self) -> str: ...


class Bank(Protocol):
    """Where an engine keeps prompts in memory; `drop` tells it that one was replaced or deleted."""

    def pin(self, name: str) -> None: ...
    def unpin(self, name: str) -> None: ...
    def pinned(self) -> dict[str, bool]: ...
    def unload(self, name: str) -> None: ...
    def drop(self, name: str) -> None: ...
    def tier(self, version: str) -> str: ...
    def stats(self) -> Any: ...


class Engine(Protocol):
    """An engine of any kind: a backbone under a served name, and the prompts that go with it.

    `observe` is called on the event loop with every finished request.
    """

    observe: Callable[[Any], None]

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def registry(self) -> PromptRegistry: ...
    @property
    def residency(self) -> Bank: ...
    @property
    def ready(self) -> bool: ...
    @property
    def alive(self) -> bool: ...
    async def start(self) -> None: ...
    async def close(self, drain: float | None = None) -> None: ...
    def stats(self) -> Any: ...


class TextEngine(Engine, Protocol):
    """An engine that continues texts.

    `generate` raises what is wrong with a request before its first delta, and what goes wrong with its row later on;
    closing the iterator cancels the row.
    """

    @property
    def limits(self) -> Limits: ...
    def generate(self, generation: Generation) -> AsyncIterator[Delta]: ...
