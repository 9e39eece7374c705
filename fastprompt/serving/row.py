"""One row of a request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastprompt.serving.request import Generation
from fastprompt.serving.sampling import Sampler

if TYPE_CHECKING:
    from fastprompt.serving.residency import Lease


@dataclass(eq=False)
class Row:
    """Choice `index` of a request; a token of `ends` ends it.

    `tokens` are its text and what was generated so far; keys and values of the first `computed` of them lie in
    `blocks`, of which the first `shared` are registered in the pool by `keys`. `lease` holds its prompt's version on
    the device, from the first admission to the end: also while a preempted row waits.
    """

    generation: Generation
    index: int
    sampler: Sampler
    ends: Sequence[int]
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    shared: int = 0
    lease: Lease | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.generation.token_ids)

    @property
    def prompt(self) -> str | None:
        return self.generation.prompt

    @property
    def text_length(self) -> int:
        """Tokens of the text, without the generated ones."""
        return len(self.generation.token_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.text_length

    @property
    def due(self) -> int:
        """Tokens to run before the next one can be chosen: all of the text at first, then one."""
        return len(self.tokens) - self.computed
