"""Tasks get their own text, leave when they like, and are told when something ends."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from serving_cases import alone, engine, greedy, save_prompts, texts

from fastprompt import demo
from fastprompt.errors import ArgumentError, PromptNotFoundError
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.engine import StepError
from fastprompt.serving.request import Generation, OverloadedError, SamplingParams, Tokens
from fastprompt.serving.scheduler import Rules


class Numbers:
    """Tokens as text: their numbers."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(f"{token} " for token in tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 5)
    return path


def _serve(folder, test, **options):
    """Run an async function with a started engine."""

    async def main():
        limits = {"max_queued": options.pop("max_queued")} if "max_queued" in options else {}
        made = AsyncEngine(lambda: engine(folder, **options), Numbers(), "tiny", **limits)
        await made.start()
        try:
            return await test(made)
        finally:
            await made.close()
            assert not made.alive

    return asyncio.run(main())


async def _text(engine, request):
    deltas = [delta async for delta in engine.generate(request)]
    return "".join(d.text for d in deltas), deltas


def test_concurrent_tasks_get_their_own_answers(folder):
    requests = [greedy(t, [None, "p0", "p1", "p2"][i % 4]) for i, t in enumerate(texts(24))]
    seen = []

    async def test(made):
        made.observe = seen.append
        return await asyncio.gather(*(_text(made, request) for request in requests))

    for request, (text, deltas) in zip(requests, _serve(folder, test), strict=True):
        expected = alone(folder, request.token_ids, request.prompt)
        assert text == Numbers().decode(expected)
        assert [t for d in deltas for t in d.tokens] == expected
        assert deltas[-1].finish_reason in ("stop", "length")
    assert len(seen) == 24 and all(f.time_to_first_token <= f.seconds for f in seen if f.completion_tokens)


def test_stop_strings_end_the_row_in_the_engine_too(folder):
    async def test(made):
        full, _ = await _text(made, greedy([5, 6, 7], "p0", 40, ignore_eos=True))
        stop = " ".join(full.split()[3:5])
        text, deltas = await _text(made, greedy([5, 6, 7], "p0", 40, ignore_eos=True, stop=(stop,)))
        assert text == full[: full.index(stop)]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
        await _idle(made)

    _serve(folder, test)


async def _idle(made):
    for _ in range(2000):
        if not made.stats().running and not made.engine.busy:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("rows run on")


def test_leaving_early_cancels(folder):
    seen = []

    async def test(made):
        made.observe = seen.append
        stream = made.generate(greedy([5, 6, 7], "p0", 200, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()
        await _idle(made)
        assert made.engine.stats().generated_tokens < 200
        assert made.engine.stats().blocks_free == made.engine.stats().blocks

    _serve(folder, test)
    assert [f.finish_reason for f in seen] == ["abort"]


def test_errors_reach_their_own_task(folder):
    async def test(made):
        with pytest.raises(PromptNotFoundError):
            await _text(made, greedy([5], "nobody"))
        with pytest.raises(ArgumentError, match="no tokens"):
            await _text(made, greedy([]))
        with pytest.raises(ArgumentError, match="virtual tokens"):
            await _text(made, greedy([5] * 230, "p2", 20))
        text, _ = await _text(made, greedy([5], "p0"))
        assert text

    _serve(folder, test)


def test_no_more_than_max_queued(folder):
    async def test(made):
        tasks = [asyncio.create_task(_text(made, greedy([5], None, 50, ignore_eos=True))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 requests") as caught:
            await _text(made, greedy([5]))
        assert caught.value.retry_after > 0
        await asyncio.gather(*tasks)
        await _text(made, greedy([5]))

    _serve(folder, test, max_queued=3)


def test_draining_finishes_what_runs(folder):
    async def test(made):
        running = asyncio.create_task(_text(made, greedy([5], "p0", 60, ignore_eos=True)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(made.close(drain=600))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="closing"):
            await _text(made, greedy([5]))
        _, deltas = await running
        assert sum(len(d.tokens) for d in deltas) == 60
        await closing

    _serve(folder, test)


def test_closing_without_draining_answers_what_runs(folder):
    async def test(made):
        running = asyncio.create_task(_text(made, greedy([5], "p0", 200, ignore_eos=True)))
        await asyncio.sleep(0.05)
        await made.close()
        _, deltas = await running
        assert deltas[-1].finish_reason == "abort"

    _serve(folder, test, rules=Rules(max_rows=2))


class _Nothing:
    """An engine whose rows end when they are cancelled."""

    busy, steps = False, 0
    residency = SimpleNamespace(close=lambda: None)

    def stats(self):
        return None

    def check(self, generation):
        pass

    def add(self, generation):
        self.busy = True

    def cancel(self, request_id, index=None):
        self.busy = False
        return [Tokens(request_id, 0, (), finish_reason="abort")]

    def step(self):
        return []


def test_closing_at_any_moment_ends():
    async def once(delay):
        made = AsyncEngine(_Nothing, Numbers(), "x")
        await made.start()
        running = asyncio.create_task(_text(made, greedy([5])))
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


def test_a_request_id_is_used_once_at_a_time(folder):
    async def test(made):
        request = greedy([5], "p0", 60, ignore_eos=True)
        running = asyncio.create_task(_text(made, request))
        await asyncio.sleep(0)
        with pytest.raises(ArgumentError, match="choose another"):
            await _text(made, request)
        _, deltas = await running
        assert sum(len(d.tokens) for d in deltas) == 60
        assert (await _text(made, request))[0]

    _serve(folder, test)


def test_a_request_that_breaks_the_engine_breaks_alone(folder):
    async def test(made):
        add = made.engine.add

        def broken(generation):
            if generation.prompt is None:
                raise RuntimeError("never seen before")
            add(generation)

        made.engine.add = broken
        with pytest.raises(StepError, match="never seen before"):
            await _text(made, greedy([5]))
        assert (await _text(made, greedy([5], "p0")))[0]

    _serve(folder, test)


def test_an_observer_that_fails_fails_alone(folder, caplog):
    async def test(made):
        made.observe = [].index
        assert (await _text(made, greedy([5])))[0]

    _serve(folder, test)
    assert "observe" in caplog.text


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
        running = asyncio.create_task(_text(made, greedy([5], None, 200, ignore_eos=True)))
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
            await _text(made, greedy([5], None, 50))
        with pytest.raises(OverloadedError):
            await _text(made, greedy([5]))

    _serve(folder, test)


def test_text_of_a_real_tokenizer(tmp_path):
    """The embedded backbone's answers, as `generate` and `decode` give them."""
    tokenizer = demo.tokenizer()
    model = demo.backbone()
    ids = tokenizer("Anna lives in", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)

    async def main():
        made = AsyncEngine(
            lambda: build_engine(demo.backbone(), tmp_path / "none", EngineOptions(max_model_len=64)), tokenizer, "demo"
        )
        await made.start()
        params = SamplingParams(max_tokens=20, temperature=0.0)
        text, _ = await _text(made, Generation(ids.input_ids[0].tolist(), None, params))
        await made.close()
        return text

    assert asyncio.run(main()) == expected
