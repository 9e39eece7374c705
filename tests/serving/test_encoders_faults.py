"""What is wrong with one request to an encoder is its own affair; queues are bounded, and closing answers everybody."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from encoder_tools import NAMES, alone, classifier, engine, make_prompt, run, texts

import fastprompt as fp
from fastprompt.errors import (
    ArgumentError,
    PromptNotFoundError,
)
from fastprompt.serving.encoder_rows import EncoderRow, RowRunner
from fastprompt.serving.encoders import EncoderEngine
from fastprompt.serving.request import OverloadedError, RowFailedError

CLOSE = dict(rtol=1e-5, atol=1e-5)


def test_poisoned_requests_fail_alone():
    model, memory = classifier()
    for name, config, place in (
        ("prefix", fp.PTuningV2, 0),
        ("tokens", fp.PromptTuning, 0),
        ("head", fp.PTuningV2, -1),
    ):
        broken = memory.put(name, make_prompt(model, name, config(num_virtual_tokens=5), num_labels=2))
        list(broken.parameters())[place].data.fill_(float("nan"))
    good = texts(30)
    poison = [
        ([], "tone", ArgumentError, "no tokens"),
        ([5, 10**9], "tone", ArgumentError, "token id"),
        ([5, -1], None, ArgumentError, "token id"),
        ([5, True], None, ArgumentError, "token id"),
        ([5] * 60, "tone", ArgumentError, "at most 59"),
        ([5] * 9, "prefix", RowFailedError, "finite"),
        ([5] * 9, "tokens", RowFailedError, "not finite"),
        ([5] * 9, "head", RowFailedError, "not finite"),
        ([5, 6], "absent", PromptNotFoundError, "absent"),
    ]

    async def use(engine: EncoderEngine) -> list[Any]:
        requests = [(ids, "tone") for ids in good] + [(ids, name) for ids, name, *_ in poison]
        random.Random(0).shuffle(requests)
        asked = await asyncio.gather(*(engine.classify([i], p) for i, p in requests), return_exceptions=True)
        found = {(tuple(map(repr, ids)), prompt): a for (ids, prompt), a in zip(requests, asked, strict=True)}
        return [found[tuple(map(repr, ids)), prompt] for ids, prompt in [*((i, "tone") for i in good),
                *((i, p) for i, p, *_ in poison)]]  # fmt: skip

    answers = run(engine(model, memory, max_wait=0.05), use)
    for ids, answer in zip(good, answers, strict=False):
        np.testing.assert_allclose(answer.values[0], alone(model, ids, "tone").logits[0].numpy(), **CLOSE)
    for (*_, kind, said), answer in zip(poison, answers[len(good) :], strict=True):
        assert isinstance(answer, kind) and said in str(answer), answer


def test_a_batch_that_fails_is_halved_until_the_culprit_stands_alone(monkeypatch: pytest.MonkeyPatch):
    model, _ = classifier()
    runner, forward, sizes = RowRunner(model), RowRunner._forward, []

    def failing(self: RowRunner, rows: Any) -> Any:
        sizes.append(len(rows))
        if any(13 in row.ids for row in rows):
            raise torch.OutOfMemoryError("too much")
        return forward(self, rows)

    monkeypatch.setattr(RowRunner, "_forward", failing)
    answers = runner([EncoderRow([13 if i == 5 else 7] * 3, "tone", 2) for i in range(8)])
    assert [isinstance(a, Exception) for a in answers] == [i == 5 for i in range(8)] and sizes == [8, 4, 4, 2, 1, 1, 2]


def test_a_row_that_is_not_finite_spoils_no_other():
    model, _ = classifier()
    for name, config in (("prefix", fp.PromptTuning), ("head", fp.PTuningV2)):
        broken = make_prompt(model, name, config(num_virtual_tokens=9), num_labels=6)
        list(broken.parameters())[0 if name == "prefix" else -1].data.fill_(float("nan"))
    rows = [(ids, NAMES[i % 5] if i % 3 else ("prefix", "head")[i % 2]) for i, ids in enumerate(texts(24))]
    outputs = {None: 2, "tone": 2, "topic": 5, "tuned": 3, "long": 2, "prefix": 6, "head": 6}
    answers = RowRunner(model)([EncoderRow(ids, name, outputs[name]) for ids, name in rows])
    for (ids, name), answer in zip(rows, answers, strict=True):
        if name in ("prefix", "head"):
            assert isinstance(answer, RowFailedError) and name in str(answer)
        else:
            np.testing.assert_allclose(answer, alone(model, ids, name).logits[0].numpy(), **CLOSE)


def test_back_pressure_and_oversized_requests():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        with pytest.raises(ArgumentError, match="split it"):
            await engine.classify([[7]] * 11)
        asked = [asyncio.ensure_future(engine.classify([[7]] * 5, "tone")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await engine.classify([[7]])
        assert caught.value.retry_after >= 1.0
        assert [len(a.values) for a in await asyncio.gather(*asked)] == [5, 5]
        await engine.classify([[7]] * 10)

    run(engine(model, memory, max_queued=10, max_wait=0.02), use)


def test_cancelled_requests_free_their_rows_and_prompts():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        task = asyncio.ensure_future(engine.classify([[7]] * 8, "tone"))
        while not engine.stats().waiting:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while engine.stats().waiting:
            await asyncio.sleep(0)
        assert engine._backlog.total == 0
        assert all(not held.users for held in engine._prompts._held.values())

    run(engine(model, memory, max_wait=30.0), use)


def test_a_request_cancelled_while_its_prompt_loads_leaves_room_for_the_next():
    model, memory = classifier()
    gate = threading.Event()
    memory.before_load = lambda version: gate.wait(60)  # type: ignore[assignment]

    async def use(engine: EncoderEngine) -> None:
        first = asyncio.ensure_future(engine.classify([[7]], "tone"))
        await asyncio.sleep(0.02)
        second = asyncio.ensure_future(engine.classify([[7]], "tuned"))
        first.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert len((await second).values) == 1

    run(engine(model, memory, max_prompts=1), use)


def test_closing_lets_requests_finish_and_refuses_new_ones():
    model, memory = classifier()

    async def use() -> None:
        served = engine(model, memory, max_wait=0.1)
        finished: list[Any] = []
        served.observe = finished.append
        assert not served.ready and not served.alive
        with pytest.raises(OverloadedError):
            await served.classify([[7]])
        await served.start()
        assert served.ready and served.alive
        asked = asyncio.ensure_future(served.classify([[7]] * 3, "tone"))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(served.close(drain=60))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await served.classify([[7]])
        await closing
        assert len((await asked).values) == 3 and not served.alive
        (record,) = finished
        assert (record.prompt, record.prompt_tokens, record.completion_tokens) == ("tone", 3, 0)

    asyncio.run(use())


def test_every_request_that_was_taken_in_is_told_of():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        told: list[Any] = []
        engine.observe = told.append
        await engine.classify([[7], [8, 9]], "tone")
        with pytest.raises(PromptNotFoundError):
            await engine.classify([[7]], "absent")
        gone = asyncio.ensure_future(engine.classify([[7]]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert [(f.prompt, f.prompt_tokens, f.finish_reason) for f in told] == [
            ("tone", 3, "stop"),
            ("absent", 1, "error"),
            (None, 1, "abort"),
        ]

    run(engine(model, memory, max_wait=0.05), use)


def test_a_prompt_that_floods_leaves_room_for_others():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        asked = [asyncio.ensure_future(engine.classify([[7]], "tone")) for _ in range(90)]
        await asyncio.sleep(0)
        assert len((await engine.classify([[7]], "tuned")).values) == 1
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, OverloadedError)]
        assert len(refused) == 10 and "of this prompt" in str(refused[0])  # eight ninths

    run(engine(model, memory, max_queued=90, max_wait=0.02), use)


def test_closing_answers_whoever_waits_for_a_prompt():
    """The only place is taken by a prompt in use; the next request waits for it when the server stops."""
    model, memory = classifier()

    async def use() -> None:
        served = engine(model, memory, max_wait=30.0, max_prompts=1)
        await served.start()
        first = asyncio.ensure_future(served.classify([[7]] * 3, "tone"))
        while not served.stats().waiting:
            await asyncio.sleep(0.005)
        second = asyncio.ensure_future(served.classify([[7]], "tuned"))
        await asyncio.sleep(0.05)
        await served.close()
        for task in (first, second):
            with pytest.raises(OverloadedError, match="stopping"):
                await task
        assert served._backlog.total == 0

    asyncio.run(use())
