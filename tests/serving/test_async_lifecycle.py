"""Starting, draining, closing, and the end of the engine's thread: nobody waits for ever."""

import asyncio
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from async_cases import Numbers, serve, text_of
from serving_cases import engine, greedy, save_prompts

from fastprompt.errors import ArgumentError
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.engine import StepError
from fastprompt.serving.request import OverloadedError, Tokens
from fastprompt.serving.scheduler import Rules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 2)
    return path


def test_draining_finishes_what_runs(folder):
    async def test(made):
        running = asyncio.create_task(text_of(made, greedy([5], "p0", 60, ignore_eos=True)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(made.close(drain=600))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="closing"):
            await text_of(made, greedy([5]))
        _, deltas = await running
        assert sum(len(d.tokens) for d in deltas) == 60
        await closing

    serve(folder, test)


def test_closing_without_draining_answers_what_runs(folder):
    async def test(made):
        held, step = threading.Event(), made.engine.step
        made.engine.step = lambda: (held.wait(600), step())[1]
        running = asyncio.create_task(text_of(made, greedy([5], "p0", 200, ignore_eos=True)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(made.close())
        await asyncio.sleep(0)
        held.set()  # what was to run has been told to end by now
        _, deltas = await running
        assert deltas[-1].finish_reason == "abort"
        await closing

    serve(folder, test, rules=Rules(max_rows=2))


def test_prompts_come_and_go_while_no_row_runs(folder, tmp_path):
    """Pins, replaced and unloaded prompts need nobody who asks for an answer."""
    for name in ("p0", "p1"):
        shutil.copytree(folder / name, tmp_path / name)

    async def until(what):
        while not what():
            await asyncio.sleep(0.001)

    async def test(made):
        residency, version = made.residency, made.registry.current("p0").version
        residency.pin("p0")
        await until(lambda: residency.pinned()["p0"] and residency.tier(version) == "device")
        await until(lambda: not made.engine.waits)
        made.registry.put("p0", {file.name: file.read_bytes() for file in (tmp_path / "p1").iterdir()})
        residency.drop("p0")
        await until(lambda: residency.tier(made.registry.current("p0").version) == "device")
        await until(lambda: residency.tier(version) == "disk")
        residency.unpin("p0")
        residency.unload("p0")
        await until(lambda: residency.stats().device.prompts == residency.stats().host.prompts == 0)

    serve(tmp_path, lambda made: asyncio.wait_for(test(made), 600))


class _Nothing:
    """An engine whose rows end when they are cancelled."""

    waits, steps = False, 0
    residency = SimpleNamespace(close=lambda: None)

    def stats(self):
        return None

    def check(self, generation):
        pass

    def add(self, generation):
        self.waits = True

    def cancel(self, request_id, index=None):
        self.waits = False
        return [Tokens(request_id, 0, (), finish_reason="abort")]

    def step(self):
        return []


def test_closing_at_any_moment_ends():
    async def once(delay):
        made = AsyncEngine(_Nothing, Numbers(), "x")
        await made.start()
        running = asyncio.create_task(text_of(made, greedy([5])))
        await asyncio.sleep(delay)
        await made.close()
        assert not made.alive
        return await running

    async def main():
        for i in range(400):
            _, deltas = await asyncio.wait_for(once(1e-5 * (i % 40)), 60)
            assert deltas[-1].finish_reason == "abort"

    asyncio.run(main())


def test_an_engine_that_cannot_be_built_says_so():
    def broken():
        raise ArgumentError("no such model")

    async def main():
        with pytest.raises(ArgumentError, match="no such model"):
            await AsyncEngine(broken, Numbers(), "x").start()

    asyncio.run(main())


def test_closing_what_never_started(folder):
    def broken():
        raise ArgumentError("no such model")

    async def main():
        await AsyncEngine(broken, Numbers(), "x").close()
        made = AsyncEngine(broken, Numbers(), "x")
        with pytest.raises(ArgumentError):
            await made.start()
        await made.close()

    asyncio.run(main())


def test_a_start_that_is_given_up_or_repeated(folder, caplog):
    go = threading.Event()

    async def main():
        made = AsyncEngine(lambda: go.wait() and engine(folder), Numbers(), "x")
        starting = asyncio.create_task(made.start())
        await asyncio.sleep(0)
        with pytest.raises(ArgumentError, match="started"):
            await made.start()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        go.set()
        await made.close()
        await asyncio.sleep(0)
        assert not made.alive

    asyncio.run(main())
    assert not caplog.records


def test_a_loop_that_is_gone_ends_the_thread_quietly(folder, caplog):
    async def main():
        made = AsyncEngine(lambda: engine(folder), Numbers(), "x")
        await made.start()
        running = asyncio.create_task(text_of(made, greedy([5], None, 200, ignore_eos=True)))
        while not made.engine.busy and not running.done():
            await asyncio.sleep(0)
        return made

    made = asyncio.run(main())
    made.residency.on_ready()
    made._thread.join(600)
    assert not made.alive and not [r for r in caplog.records if r.exc_info]
    made.residency.close()


def test_a_thread_that_ends_tells_everybody(folder):
    async def test(made):
        def step():
            raise RuntimeError("gone")

        made.engine.step = step
        with pytest.raises(StepError, match="gone"):
            await text_of(made, greedy([5], None, 50))
        with pytest.raises(OverloadedError):
            await text_of(made, greedy([5]))

    serve(folder, test)


def test_a_lost_device_ends_the_thread(folder):
    async def test(made):
        def lost(slices, arenas):
            raise torch.AcceleratorError("an illegal memory access was encountered")

        made.engine.runner.run = lost
        with pytest.raises(StepError, match="illegal memory access"):
            await text_of(made, greedy([5], None, 50))
        made._thread.join(600)
        assert not made.alive and not made.ready

    serve(folder, test)


def test_closing_does_not_hold_the_loop_up(folder):
    """Loaders end at their own pace: a file that is being read must not stop other tasks of the loop."""

    async def main():
        made = AsyncEngine(lambda: engine(folder), Numbers(), "x")
        await made.start()
        close, go = made.residency.close, threading.Event()
        made.residency.close = lambda: (go.wait(600), close())
        closing = asyncio.create_task(made.close())
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not closing.done()
        go.set()
        await closing

    asyncio.run(main())
