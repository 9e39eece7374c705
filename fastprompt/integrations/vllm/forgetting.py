"""Pages that were computed behind a prefix that could not be loaded, taken out of vLLM's prefix cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

_STEPS = 8  # that may lie between a request's first step and what its workers report


class CacheMemory:
    """What began lately, and the pages that vLLM would find it by.

    Semantics:
        begins(request, blocks)      in the step that is being planned it reads these pages
        step()                       the step is planned
        forget(invalid)              of requests that read such a page, and all that began lately under their salt:
                                     for hash in request.block_hashes: pool.evict(all pages with that hash)
    vLLM fails the requests that run on such pages and forgets the pages behind them of the first one. It keeps those of
    others that share them, of requests that were aborted within the step, and of preempted ones: a later request with
    the same text would find them.
    """

    def __init__(self) -> None:
        self.pool: Any = None
        self._steps: deque[list[tuple[Any, Sequence[int]]]] = deque([[]], maxlen=_STEPS)

    def begins(self, request: Any, blocks: Sequence[int]) -> None:
        if request.cache_salt:
            self._steps[-1].append((request, blocks))

    def step(self) -> None:
        self._steps.append([])

    def forget(self, invalid: set[int] | None) -> None:
        if not invalid:
            return
        begun = [entry for step in self._steps for entry in step]
        salts = {request.cache_salt for request, blocks in begun if not invalid.isdisjoint(blocks)}
        for request, _ in begun:
            if request.cache_salt in salts:
                self._forget(request)

    def _forget(self, request: Any) -> None:
        for block_hash in request.block_hashes:
            evicted: set[int] = set()
            while (found := self.pool.get_cached_block(block_hash, [0])) and found[0].block_id not in evicted:
                evicted.add(found[0].block_id)
                self.pool.evict_blocks({found[0].block_id})
