"""Rate limits: what a key may do in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastprompt.serving.http.errors import invalid, too_many

Clock = Callable[[], float]


class Bucket:
    """A minute's allowance that refills evenly; `clock` is in seconds."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    def take(self, amount: float) -> float:
        """Take an amount and return 0, or take nothing and return the seconds until it will be there."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + max(0.0, now - self._seen) * self.per_minute / 60)
        self._seen = now
        if amount <= self._level:
            self._level -= amount
            return 0.0
        return (amount - self._level) * 60 / self.per_minute

    def give_back(self, amount: float) -> None:
        """Return what was taken and not used."""
        self._level = min(self.per_minute, self._level + amount)


class Limiter:
    """The limits of one key; None is no limit."""

    def __init__(self, requests: int | None, tokens: int | None, clock: Clock = time.monotonic) -> None:
        self.requests = Bucket(requests, clock) if requests else None
        self.tokens = Bucket(tokens, clock) if tokens else None

    def take_request(self) -> None:
        """Count a request. Errors: ApiError 429."""
        if self.requests and (wait := self.requests.take(1)):
            raise too_many(
                f"Rate limit reached: {self.requests.per_minute} requests a minute; try again in {wait:.1f} s", wait
            )

    def take_tokens(self, prompt: int, most: int) -> int:
        """Reserve what a request reads and may write, at most a minute's allowance; returns what was taken.

        Errors: ApiError 429, or 400 for a text that alone is more than the allowance.
        """
        if not self.tokens:
            return 0
        allowance = self.tokens.per_minute
        if prompt > allowance:
            raise invalid(
                f"the request reads {prompt} tokens, this key may use {allowance} a minute: shorten the text",
                code="request_too_large",
            )
        taken = min(prompt + most, allowance)
        if wait := self.tokens.take(taken):
            raise too_many(f"Rate limit reached: {allowance} tokens a minute; try again in {wait:.1f} s", wait)
        return taken

    def settle(self, taken: int, used: int) -> None:
        """Give back what a request reserved and did not use."""
        if self.tokens:
            self.tokens.give_back(max(0, taken - used))
