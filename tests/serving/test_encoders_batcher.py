"""The batcher: fair order, bounded padding, deadlines, failures and back-pressure."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastprompt.errors import ArgumentError
from fastprompt.serving.batcher import Batcher, BatchLimits, FairQueue, Queued, choose
from fastprompt.serving.request import OverloadedError


def row(tenant: str | None, width: int) -> Queued:
    return Queued(tenant, width, None, None, 0.0, 0.0)  # type: ignore[arg-type]


def test_rows_of_similar_length_go_together_and_padding_is_bounded():
    widths = [10, 100, 11, 9, 12, 90, 10]
    limits = BatchLimits(max_tokens=1000, max_padding=0.2)
    batch = choose([row("a", w) for w in widths], limits)
    assert [r.width for r in batch] == [10, 11, 9, 12, 10]
    total, padded = sum(r.width for r in batch), 12 * len(batch)
    assert total >= 0.8 * padded


def test_a_batch_keeps_its_budget_of_tokens_and_rows():
    rows = [row("a", 10) for _ in range(20)]
    assert len(choose(rows, BatchLimits(max_tokens=75))) == 7
    assert len(choose(rows, BatchLimits(max_rows=3))) == 3
    assert [r.width for r in choose([row("a", 80), row("a", 1)], BatchLimits(max_tokens=40))] == [80]
    assert choose([], BatchLimits()) == []


def test_every_row_of_a_random_queue_is_served_once_within_the_limits():
    generator = __import__("random").Random(3)
    queue, limits = FairQueue(), BatchLimits(max_tokens=256, max_rows=9, max_padding=0.3)
    rows = [row(generator.choice("abcd"), int(generator.paretovariate(1.0)) % 90 + 1) for _ in range(300)]
    for r in rows:
        queue.add(r)
    served: list[Queued] = []
    while batch := queue.serve(limits):
        longest = max(r.width for r in batch)
        assert len(batch) <= 9 and longest * len(batch) <= 256
        assert sum(r.width for r in batch) >= 0.7 * longest * len(batch)
        served += batch
    assert sorted(map(id, served)) == sorted(map(id, rows))
    assert queue.tokens == 0 and not queue.by_tenant and not queue.rows


def test_a_tenant_that_floods_does_not_starve_another():
    queue, limits = FairQueue(), BatchLimits(max_tokens=40)
    for _ in range(500):
        queue.add(row("flood", 10))
    queue.serve(limits)
    for _ in range(6):
        queue.add(row("quiet", 10))
    served = [r.tenant for _ in range(4) for r in queue.serve(limits)]
    assert served.count("quiet") == 6  # within three batches of four rows each, though 496 were there before


def test_idle_tenants_save_nothing_up():
    queue, limits = FairQueue(), BatchLimits(max_tokens=10)
    for _ in range(50):
        queue.add(row("busy", 10))
        queue.serve(limits)
    for _ in range(10):
        queue.add(row("busy", 10))
        queue.add(row("late", 10))
    first = [queue.serve(limits)[0].tenant for _ in range(10)]
    assert first.count("late") == 5


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"max_rows": 0}, {"max_wait": -1.0}, {"max_wait": float("nan")}, {"max_padding": 1.0}],
)
def test_limits_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(ArgumentError, match="expected"):
        BatchLimits(**options)


class Bench:
    """A batcher whose function notes its batches and can be held."""

    def __init__(self, **limits: Any) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.thread = ThreadPoolExecutor(1)
        self.batcher = Batcher(self._run, self.thread, BatchLimits(**limits))

    def _run(self, work: list[Any]) -> list[Any]:
        self.gate.wait(60)
        self.batches.append(work)
        if "crash" in work:
            raise RuntimeError("the whole batch")
        return [ValueError(w) if w == "bad" else w * 2 for w in work]

    async def __aenter__(self) -> Bench:
        self.batcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.set()
        await self.batcher.close()
        self.thread.shutdown()


def test_rows_that_come_together_are_one_batch_and_fail_apart():
    async def run() -> None:
        async with Bench(max_wait=0.05) as bench:
            futures = [bench.batcher.submit("a", 1, w) for w in ("x", "bad", "y")]
            results = await asyncio.gather(*futures, return_exceptions=True)
            assert results[0] == "xx" and results[2] == "yy" and isinstance(results[1], ValueError)
            assert bench.batches == [["x", "bad", "y"]]
            with pytest.raises(RuntimeError, match="whole batch"):
                await bench.batcher.submit("a", 1, "crash")
            assert await bench.batcher.submit("a", 1, "z") == "zz" and bench.batcher.alive
            assert bench.batcher.totals.batches == 3 and bench.batcher.totals.rows == 5

    asyncio.run(run())


def test_a_full_batch_does_not_wait_for_its_deadline():
    async def run() -> None:
        async with Bench(max_wait=50.0, max_rows=2) as bench:
            begin = time.monotonic()
            assert await asyncio.gather(*(bench.batcher.submit("a", 1, w) for w in "xy")) == ["xx", "yy"]
            assert time.monotonic() - begin < 25

    asyncio.run(run())


def test_a_lonely_row_goes_at_its_deadline():
    async def run() -> None:
        async with Bench(max_wait=0.02) as bench:
            assert await bench.batcher.submit(None, 1, "x") == "xx"

    asyncio.run(run())


def test_cancelled_rows_leave_the_queue_and_are_not_run():
    async def run() -> None:
        async with Bench(max_wait=0.0) as bench:
            bench.gate.clear()
            first = bench.batcher.submit("a", 1, "x")
            await asyncio.sleep(0.01)
            gone, kept = bench.batcher.submit("a", 1, "gone"), bench.batcher.submit("b", 1, "kept")
            gone.cancel()
            while len(bench.batcher.queue.rows) > 1:
                await asyncio.sleep(0)
            assert [r.work for r in bench.batcher.queue.rows] == ["kept"] and bench.batcher.running == {"a": 1}
            bench.gate.set()
            assert await asyncio.gather(first, kept) == ["xx", "keptkept"]
            assert bench.batches == [["x"], ["kept"]]

    asyncio.run(run())


def test_closing_answers_everybody():
    async def run() -> None:
        bench = Bench(max_wait=0.0)
        with pytest.raises(OverloadedError):
            bench.batcher.submit("a", 1, "early")
        async with bench:
            bench.gate.clear()
            futures = [bench.batcher.submit("a", 1, "x")]
            await asyncio.sleep(0.01)
            futures.append(bench.batcher.submit("a", 1, "y"))
            await bench.batcher.close()
            results = await asyncio.gather(*futures, return_exceptions=True)
            assert [type(r) for r in results] == [OverloadedError, OverloadedError]
            assert not bench.batcher.alive

    asyncio.run(run())


def test_many_cancelled_rows_leave_at_once():
    """One by one they took seconds of the event loop: each looks through the queue."""

    async def run() -> None:
        async with Bench(max_wait=50.0, max_rows=10_000) as bench:
            batcher = bench.batcher
            gone = [batcher.submit("a", 2, i) for i in range(2000)]
            stay = [batcher.submit("b", 3, i) for i in range(10)]
            looked, remove = [0], batcher.queue.remove

            def counted(rows: Any) -> None:
                looked[0] += 1
                remove(rows)

            batcher.queue.remove = counted  # type: ignore[method-assign]
            for future in gone:
                future.cancel()
            while batcher.queue.by_tenant["a"]:
                await asyncio.sleep(0)
            assert looked[0] <= 3 and len(batcher.queue.rows) == 10 and batcher.queue.tokens == 30
            for future in stay:
                future.cancel()

    asyncio.run(run())
