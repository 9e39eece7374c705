"""What one call of a prompted backbone carries to the attention, position and head hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastprompt.batch import PrefixBatch

if TYPE_CHECKING:
    from fastprompt.heads import RowHeads
    from fastprompt.in_place import VirtualTokens
    from fastprompt.integrations.transformers.paged import PagedMask


@dataclass
class AttentionCall:
    """One call of the attention interface, as the probe saw it."""

    module: Any
    key: torch.Tensor
    value: torch.Tensor
    self_attention: bool
    relative_bias: bool


@dataclass(eq=False)
class Owner:
    """A backbone's identity: its configs, of which the parts of a model have one or several."""

    configs: tuple[Any, ...]

    def has(self, config: object) -> bool:
        return any(config is c for c in self.configs)


@dataclass
class Call:
    """State of one prompted forward (or of all forwards of one `generate`).

    `owner` is the backbone that is meant: another model may run meanwhile (an assistant).
    `record` receives `layer -> (key, value)` while a prompt is compiled; `probe` every attention call while a
    backbone is inspected. `placed` tells whether the `virtual` tokens have reached the backbone. In a `blind`
    forward attention gives zeros. `paged` is the step of a serving engine, whose rows are packed.
    """

    owner: Owner
    batch: PrefixBatch | None = None
    record: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    probe: list[AttentionCall] | None = None
    heads: RowHeads | None = None
    virtual: VirtualTokens | None = None
    placed: bool = False
    blind: bool = False
    paged: PagedMask | None = None
    expanded: dict[int, PrefixBatch] = field(default_factory=dict)

    @property
    def observes(self) -> bool:
        """Whether keys and values are to be handed out."""
        return self.record is not None or self.probe is not None

    def batch_of(self, rows: int) -> PrefixBatch | None:
        """The batch with each row repeated as `generate` does for beams and return sequences."""
        if self.batch is None or rows == self.batch.rows:
            return self.batch
        if rows not in self.expanded:
            self.expanded[rows] = self.batch.repeat_to(rows)
        return self.expanded[rows]


_ACTIVE: ContextVar[Call | None] = ContextVar("fastprompt_call", default=None)


def active(owner: Owner | None = None) -> Call | None:
    """The call under way in this thread, if any; with `owner`, only that backbone's."""
    call = _ACTIVE.get()
    return call if call is None or owner is None or call.owner is owner else None


@contextmanager
def activate(call: Call) -> Iterator[Call]:
    """Make `call` the one under way."""
    token = _ACTIVE.set(call)
    try:
        yield call
    finally:
        _ACTIVE.reset(token)
