"""What is under way, prompt by prompt, and whose share of the room is used up."""

from __future__ import annotations

from collections import Counter

from fastprompt.serving.request import OverloadedError

_SHARE = 8  # of the free room, that one prompt may have under way


class Backlog:
    """Counts what is under way and refuses more, of a prompt that floods before others.

    Semantics (dynamic thresholds, Choudhury and Hahne 1998):
        enter(prompt, n)   counted if own + n <= 8 * (most - all) and all + n <= most; else OverloadedError
    So there is never more than `most`, one prompt alone fills eight ninths of it, and room is left for others.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what = most, what
        self.total = 0
        self._own: Counter[str | None] = Counter()

    def enter(self, prompt: str | None, count: int = 1, retry_after: float = 1.0) -> None:
        """Count what comes. Errors: OverloadedError."""
        own = self._own.get(prompt, 0)
        if self.total + count > self.most or own + count > _SHARE * (self.most - self.total):
            raise OverloadedError(
                f"{self.total} {self.what} are under way, {own} of them of this prompt, {count} more came and at most "
                f"{self.most} are taken: try again later",
                retry_after,
            )
        self._own[prompt] += count
        self.total += count

    def leave(self, prompt: str | None, count: int = 1) -> None:
        """What was counted has ended."""
        self.total -= count
        self._own[prompt] -= count
        if not self._own[prompt]:
            del self._own[prompt]
