"""The time of a run shared among its parts: what one does not use, those behind it get."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bench.gpu_check.parts import Part

_LEAST = 10.0  # seconds below which a part is not begun
_LAST = 10.0  # seconds kept for the report


class Budget:
    """Seconds a run may take, from when this is made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._end = self._begin + seconds - min(_LAST, seconds / 10)

    def used(self) -> float:
        """Seconds so far."""
        return self._clock() - self._begin

    def share(self, part: Part, after: Sequence[Part]) -> float:
        """Seconds for a part, given those that follow it; 0 where too little is left to begin it."""
        left = self._end - self._clock()
        seconds = left * part.share / (part.share + sum(other.share for other in after))
        return seconds if seconds >= _LEAST else left if left >= _LEAST else 0.0
