"""How much memory rows will want until they end, judged by how long answers have been."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from fastprompt.serving.blocks import BlockPool
from fastprompt.serving.row import Row

_WEIGHT = 0.1  # of the last answer in a running mean
_PROMPTS = 4096  # whose answers are remembered


class Forecast:
    """Whether rows will find blocks until they end, if each is answered as its prompt's rows have been lately.

    Semantics:
        left(row)        tokens it will still get: up to its prompt's mean; to that of all prompts while this one has
                         had no answer, and to max_tokens while nobody has; at least a block more than it has by then
        fits(rows)       at each of their ends, what is held then and what the others have grown by is in the pool
    A guess that is wrong costs a preemption, and no answer.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._mean: float | None = None
        self._means: OrderedDict[str | None, float] = OrderedDict()  # by prompt, the one that answered last at the end

    def ended(self, row: Row) -> None:
        """Learn from a row that has its answer, or as much of it as anybody wanted."""
        if not row.generated:
            return
        self._mean = _moved(self._mean, row.generated)
        self._means[row.prompt] = _moved(self._means.pop(row.prompt, None), row.generated)
        if len(self._means) > _PROMPTS:
            self._means.popitem(last=False)

    def left(self, row: Row) -> int:
        most = row.generation.params.max_tokens
        mean = self._means.get(row.prompt, self._mean)
        whole = most if mean is None else min(most, max(round(mean), row.generated + self._pool.size))
        return whole - row.generated

    def fits(self, rows: Iterable[Row]) -> bool:
        """Whether rows will find the blocks that they do not hold yet."""
        ends = sorted(((self.left(row), row) for row in rows), key=lambda end: end[0])
        size = self._pool.size
        if sum(-(-(len(r.tokens) + left) // size) - len(r.blocks) for left, r in ends) <= self._pool.free:
            return True
        running, tokens, blocks = len(ends), sum(len(r.tokens) for _, r in ends), sum(len(r.blocks) for _, r in ends)
        room = self._pool.free
        for left, row in ends:  # when this one ends, those before it have given back what was theirs alone
            if -(-(tokens + running * (left + size // 2)) // size) - blocks > room:
                return False
            running, tokens, blocks = running - 1, tokens - len(row.tokens), blocks - len(row.blocks)
            room += self._pool.alone(row.blocks)
        return True


def _moved(mean: float | None, value: int) -> float:
    return float(value) if mean is None else mean + _WEIGHT * (value - mean)
