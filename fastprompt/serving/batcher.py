"""Rows of many tenants, batched: in fair order, rows of similar length together, one batch at a time."""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from fastprompt.errors import ArgumentError
from fastprompt.serving.request import OverloadedError

_SMOOTHING = 0.1  # weight of the last batch in running means


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may grow and how long it may wait for that.

    A batch's tokens are its rows times the longest of them; `max_padding` is the share of them that may be padding.
    """

    max_tokens: int = 16384
    max_rows: int = 256
    max_wait: float = 0.005  # seconds
    max_padding: float = 0.25

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.max_rows < 1 or not 0 <= self.max_wait < 60 or not 0 <= self.max_padding < 1:
            raise ArgumentError(
                f"{self}: expected max_tokens and max_rows of at least 1, max_wait in [0, 60) seconds and max_padding "
                "in [0, 1)"
            )


@dataclass(eq=False)
class Queued:
    """A row that waits: `work` is handed to the batch function, `width` are its tokens."""

    tenant: str | None
    width: int
    work: Any
    future: asyncio.Future[Any]
    turn: float
    due: float


class FairQueue:
    """Rows in the order in which their tenants' turns come (start-time fair queueing, Goyal et al. 1996).

    Semantics:
        turn = max(now, end[tenant]);  end[tenant] = turn + width      # now: the turn of the row served last
    So each tenant with waiting rows gets an equal share of tokens, whatever the others queue, and shares that nobody
    claims are not saved up.
    """

    def __init__(self) -> None:
        self.rows: list[Queued] = []
        self.tokens = 0
        self.by_tenant: Counter[str | None] = Counter()
        self._now = 0.0
        self._end: dict[str | None, float] = {}

    def add(self, row: Queued) -> None:
        row.turn = max(self._now, self._end.get(row.tenant, 0.0))
        self._end[row.tenant] = row.turn + row.width
        insort(self.rows, row, key=lambda r: r.turn)
        self.tokens += row.width
        self.by_tenant[row.tenant] += 1

    def remove(self, rows: Sequence[Queued]) -> None:
        gone = set(map(id, rows))
        left = [row for row in self.rows if id(row) not in gone]
        for row in self.rows:
            if id(row) in gone:
                self.tokens -= row.width
                self.by_tenant[row.tenant] -= 1
        self.rows, self.by_tenant = left, +self.by_tenant
        if not left:
            self._end.clear()

    def serve(self, limits: BatchLimits) -> list[Queued]:
        """Take the next batch: the row whose turn it is, and the next ones that fit beside it."""
        batch = choose(self.rows, limits)
        if batch:
            self._now = max(self._now, batch[0].turn)
            self.remove(batch)
            self._end = {tenant: end for tenant, end in self._end.items() if end > self._now}
        return batch


def choose(rows: Sequence[Queued], limits: BatchLimits) -> list[Queued]:
    """The first of `rows` and, in order, those that keep a batch with it inside `limits`; it goes alone if too wide."""
    batch: list[Queued] = []
    longest = total = 0
    for row in rows:
        width = max(longest, row.width)
        padded = width * (len(batch) + 1)
        small = padded <= limits.max_tokens and total + row.width >= (1 - limits.max_padding) * padded
        if small or not batch:
            batch.append(row)
            longest, total = width, total + row.width
            if len(batch) == limits.max_rows:
                break
    return batch


@dataclass
class BatchTotals:
    """What a batcher has done since its start; `last` and `mean` are seconds of a batch, tokens include padding."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    last_rows: Counter[str | None] = field(default_factory=Counter)  # of the last batch, by tenant
    last: float = 0.0
    mean: float = 0.0
    per_token: float = 0.0

    def add(self, batch: Sequence[Queued], seconds: float) -> None:
        padded = max(row.width for row in batch) * len(batch)
        share = _SMOOTHING if self.batches else 1.0
        self.batches += 1
        self.rows += len(batch)
        self.tokens += sum(row.width for row in batch)
        self.padded_tokens += padded
        self.last_rows, self.last = Counter(row.tenant for row in batch), seconds
        self.mean += share * (seconds - self.mean)
        self.per_token += share * (seconds / padded - self.per_token)


class Batcher:
    """Runs `run(list of work) -> list of results or exceptions` on `thread`, batch after batch.

    Semantics: a batch starts when the one before has ended and either the waiting rows fill it or one of them has
    waited `limits.max_wait`. All methods are called on one event loop; only `run` runs on `thread`.
    """

    def __init__(
        self, run: Callable[[list[Any]], Sequence[Any]], thread: Executor, limits: BatchLimits = BatchLimits()
    ) -> None:
        self.limits = limits
        self.totals = BatchTotals()
        self.queue = FairQueue()
        self.running: Counter[str | None] = Counter()
        self._run, self._thread = run, thread
        self._waiting, self._full = asyncio.Event(), asyncio.Event()
        self._sweeping = False
        self._worker: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._worker is not None and not self._worker.done()

    def start(self) -> None:
        self._worker = asyncio.get_running_loop().create_task(self._work())

    def submit(self, tenant: str | None, width: int, work: Any) -> asyncio.Future[Any]:
        """Queue a row; the future gets its result, and takes it out of the queue when cancelled."""
        if not self.alive:
            raise OverloadedError("the batcher is not running: the server is starting or stopping, try again", 1.0)
        loop = asyncio.get_running_loop()
        row = Queued(tenant, width, work, loop.create_future(), 0.0, time.monotonic() + self.limits.max_wait)
        row.future.add_done_callback(self._cancelled)
        self.queue.add(row)
        self._waiting.set()
        if self._fills():
            self._full.set()
        return row.future

    def backlog(self) -> float:
        """Seconds until a row that came now would start, guessed from the batches so far."""
        return self.queue.tokens * self.totals.per_token + (self.totals.mean if self.running else 0.0)

    async def close(self) -> None:
        """Stop now; rows that wait or run fail with OverloadedError."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        left, self.queue = self.queue.rows, FairQueue()
        _answer(left, [_stopping()] * len(left))

    def _cancelled(self, future: asyncio.Future[Any]) -> None:
        """Take a row out of the queue, together with all others that were cancelled: one by one takes long."""
        if future.cancelled() and not self._sweeping:
            self._sweeping = True
            future.get_loop().call_soon(self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        self.queue.remove([row for row in self.queue.rows if row.future.done()])

    def _fills(self) -> bool:
        return self.queue.tokens >= self.limits.max_tokens or len(self.queue.rows) >= self.limits.max_rows

    async def _work(self) -> None:
        while True:
            await self._waiting.wait()
            await self._gather()
            self._sweep()
            batch = self.queue.serve(self.limits)
            if not self.queue.rows:
                self._waiting.clear()
            if batch:
                await self._serve(batch)

    async def _gather(self) -> None:
        """Wait until the batch is full or its first row is due."""
        left = min((row.due for row in self.queue.rows), default=0.0) - time.monotonic()
        if left <= 0 or self._fills():
            return
        self._full.clear()
        try:
            await asyncio.wait_for(self._full.wait(), left)
        except asyncio.TimeoutError:
            return

    async def _serve(self, batch: list[Queued]) -> None:
        self.running = Counter(row.tenant for row in batch)
        begin = time.monotonic()
        try:
            results = await self._results([row.work for row in batch])
        except asyncio.CancelledError:
            _answer(batch, [_stopping()] * len(batch))
            raise
        finally:
            self.running = Counter()
        self.totals.add(batch, time.monotonic() - begin)
        _answer(batch, results)

    async def _results(self, work: list[Any]) -> Sequence[Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)
        except Exception as error:  # whatever it is, these rows must hear of it and the next ones be served
            return [error] * len(work)


def _answer(batch: Sequence[Queued], results: Sequence[Any]) -> None:
    """Give each row's future its result or exception, unless nobody waits for it any more."""
    for row, result in zip(batch, results, strict=True):
        if row.future.done():
            continue
        if isinstance(result, Exception):
            row.future.set_exception(result)
        else:
            row.future.set_result(result)


def _stopping() -> OverloadedError:
    return OverloadedError("the server is stopping: try another one", 1.0)
