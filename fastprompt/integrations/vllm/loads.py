"""What the scheduler's half of the connector tells the workers' half: which prefix tokens to write where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt.integrations.vllm.tickets import Ticket


@dataclass(frozen=True)
class Load:
    """Tokens `start` to `stop` of a prefix, into a request's pages `blocks`; without a ticket the request must fail."""

    ticket: Ticket | None
    start: int
    stop: int
    blocks: tuple[int, ...]
    problem: str = ""

    def touched(self, block_size: int) -> tuple[int, ...]:
        """The pages that hold these tokens."""
        return self.blocks[self.start // block_size : -(-self.stop // block_size)]

    def slots(self, block_size: int) -> torch.Tensor:
        """Where each token goes, counted over all pages: int64 `[stop - start]`."""
        at = torch.arange(self.start, self.stop)
        return torch.tensor(self.blocks)[at // block_size] * block_size + at % block_size


def plan_load(ticket: Ticket | None, problem: str, external: int, tokens: Sequence[int], blocks: Sequence[int]) -> Load:
    """The load for a request of which `external` tokens are to come from here.

    They are the last ones before the end of the prefix, or of what a request without a valid ticket may have at most.
    """
    stop = ticket.length if ticket is not None else len(tokens) - 1
    return Load(ticket, stop - external, stop, tuple(blocks), problem)
