"""Tasks get their own text, leave when they like, and are told when something ends."""

import asyncio
from dataclasses import replace

import pytest
from async_cases import Numbers, StandIn, serve, text_of
from serving_cases import alone, greedy, save_prompts, texts

from fastprompt import demo
from fastprompt.errors import ArgumentError, PromptNotFoundError
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.backlog import Backlog
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.engine import StepError
from fastprompt.serving.request import Generation, OverloadedError, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 5)
    return path


def test_concurrent_tasks_get_their_own_answers(folder):
    requests = [greedy(t, [None, "p0", "p1", "p2"][i % 4]) for i, t in enumerate(texts(24))]
    seen = []

    async def test(made):
        made.observe = seen.append
        return await asyncio.gather(*(text_of(made, request) for request in requests))

    for request, (text, deltas) in zip(requests, serve(folder, test), strict=True):
        expected = alone(folder, request.token_ids, request.prompt)
        assert text == Numbers().decode(expected)
        assert [t for d in deltas for t in d.tokens] == expected
        assert deltas[-1].finish_reason in ("stop", "length")
    assert len(seen) == 24 and all(f.time_to_first_token <= f.seconds for f in seen if f.completion_tokens)


def test_stop_strings_end_the_row_in_the_engine_too(folder):
    async def test(made):
        full, _ = await text_of(made, greedy([5, 6, 7], "p0", 40, ignore_eos=True))
        stop = " ".join(full.split()[3:5])
        text, deltas = await text_of(made, greedy([5, 6, 7], "p0", 40, ignore_eos=True, stop=(stop,)))
        assert text == full[: full.index(stop)]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
        await _idle(made)

    serve(folder, test)


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

    serve(folder, test)
    assert [f.finish_reason for f in seen] == ["abort"]


def test_errors_reach_their_own_task(folder):
    async def test(made):
        with pytest.raises(PromptNotFoundError):
            await text_of(made, greedy([5], "nobody"))
        with pytest.raises(ArgumentError, match="no tokens"):
            await text_of(made, greedy([]))
        with pytest.raises(ArgumentError, match="virtual tokens"):
            await text_of(made, greedy([5] * 230, "p2", 20))
        text, _ = await text_of(made, greedy([5], "p0"))
        assert text

    serve(folder, test)


def test_no_more_than_max_queued(folder):
    async def test(made):
        tasks = [asyncio.create_task(text_of(made, greedy([5], None, 50, ignore_eos=True))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 requests") as caught:
            await text_of(made, greedy([5]))
        assert caught.value.retry_after > 0
        await asyncio.gather(*tasks)
        await text_of(made, greedy([5]))

    serve(folder, test, max_queued=3)


def test_a_request_that_breaks_the_engine_breaks_alone(folder):
    async def test(made):
        add = made.engine.add

        def broken(generation):
            if generation.prompt is None:
                raise RuntimeError("never seen before")
            add(generation)

        made.engine.add = broken
        with pytest.raises(StepError, match="never seen before"):
            await text_of(made, greedy([5]))
        assert (await text_of(made, greedy([5], "p0")))[0]

    serve(folder, test)


def test_an_observer_that_fails_fails_alone(folder, caplog):
    async def test(made):
        made.observe = [].index
        assert (await text_of(made, greedy([5])))[0]

    serve(folder, test)
    assert "observe" in caplog.text


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
        text, _ = await text_of(made, Generation(ids.input_ids[0].tolist(), None, params))
        await made.close()
        return text

    assert asyncio.run(main()) == expected


def test_requests_that_share_an_id_are_kept_apart(folder):
    async def test(made):
        first = greedy([5, 6, 7], "p0", 30, ignore_eos=True)
        second = replace(first, token_ids=[8, 9], prompt="p1")
        answers = await asyncio.gather(text_of(made, first), text_of(made, second))
        for request, (_, deltas) in zip((first, second), answers, strict=True):
            found = [token for delta in deltas for token in delta.tokens]
            expected = alone(folder, request.token_ids, request.prompt, 30)
            assert len(found) == 30 and found[: len(expected)] == expected

    serve(folder, test)


def test_nothing_of_a_request_that_left_reaches_the_next_one_of_its_id():
    """Tokens that were on their way when it was cancelled; each row of the stand-in repeats its text."""

    async def main():
        made = AsyncEngine(StandIn, Numbers(), "x")
        await made.start()
        for i in range(300):
            request = replace(greedy([8 + i % 50], new=3), request_id="same")
            stream = made.generate(replace(greedy([7], new=1000), request_id="same"))
            async for _ in stream:
                break
            await stream.aclose()
            text, _ = await text_of(made, request)
            assert text == f"{8 + i % 50} " * 3
        await made.close()

    asyncio.run(main())


def test_text_that_cannot_be_made_fails_its_own_request(caplog):
    class Picky(Numbers):
        def decode(self, tokens, skip_special_tokens=True):
            if 13 in tokens:
                raise TypeError("there is no token 13")
            return super().decode(tokens)

    async def main():
        made = AsyncEngine(StandIn, Picky(), "x")
        await made.start()
        good = [asyncio.create_task(text_of(made, greedy([i], new=9))) for i in range(5, 12)]
        with pytest.raises(StepError, match="no token 13"):
            await text_of(made, greedy([13], new=9))
        for i, task in enumerate(good):
            assert (await task)[0] == f"{5 + i} " * 9
        while made.engine.waits:
            await asyncio.sleep(0.001)
        await made.close()

    asyncio.run(main())
    assert "could not be made text" in caplog.text


def test_a_prompt_that_floods_leaves_room_for_others(folder):
    async def test(made):
        flood = []
        for _ in range(64):
            flood.append(asyncio.create_task(text_of(made, greedy([5], "p0", 200, ignore_eos=True))))
        await asyncio.sleep(0)
        refused = [flood.pop(i) for i in reversed(range(64)) if flood[i].done()]
        for task in refused:
            with pytest.raises(OverloadedError, match="of this prompt"):
                await task
        assert len(flood) == 57  # eight ninths
        assert (await text_of(made, greedy([5], "p1", 2)))[0]
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        assert made._backlog.total == 0

    serve(folder, test, max_queued=64)


def test_a_backlog_is_never_larger_than_its_most():
    backlog, counts = Backlog(100, "requests"), {}
    for prompt in [*"a" * 200, *"b" * 200, *"c" * 200]:
        try:
            backlog.enter(prompt)
        except OverloadedError:
            continue
        counts[prompt] = counts.get(prompt, 0) + 1
    assert counts["a"] == 89 and counts["b"] >= 9 and backlog.total == sum(counts.values()) <= 100
    for prompt, count in counts.items():
        backlog.leave(prompt, count)
    assert backlog.total == 0 and not backlog._own
    backlog.enter("a", 100)
    with pytest.raises(OverloadedError, match="100 requests are under way, 0 of them of this prompt, 1 more came"):
        backlog.enter("b")


def test_counts_are_taken_now_and_then(folder, monkeypatch):
    """With many prompts counting takes a while: not at every step, and yet what is idle shows as it is."""

    async def test(made):
        taken = []
        stats = made.engine.stats
        monkeypatch.setattr(made.engine, "stats", lambda: taken.append(made.engine.steps) or stats())
        monkeypatch.setattr("fastprompt.serving.async_engine._COUNT_EVERY", 1000.0)
        await text_of(made, greedy([5, 6], "p0", 150, ignore_eos=True))
        while made.stats().running or made.stats().steps < made.engine.steps:
            await asyncio.sleep(0.001)
        assert made.stats().generated_tokens == 150 and len(taken) < 50 < made.engine.steps

    serve(folder, test)


def test_stop_strings_wait_for_min_tokens():
    async def main():
        made = AsyncEngine(StandIn, Numbers(), "x")
        await made.start()
        text, deltas = await text_of(made, greedy([8], new=9, stop=("8",), min_tokens=4))
        assert text == "8 8 8 " and deltas[-1].stop_reason == "8"
        await made.close()

    asyncio.run(main())
