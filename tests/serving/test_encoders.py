"""The encoder engine: any mixture of prompts, heads and answers equals the model called alone."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from encoder_tools import Memory, classifier, engine, make_prompt, served, tagger
from task_tools import bert

import fastprompt as fp
from fastprompt.errors import (
    ArgumentError,
    BankFullError,
    IncompatiblePromptError,
    PromptNotFoundError,
    UnsupportedError,
)
from fastprompt.model import PromptedModel
from fastprompt.serving.encoder_rows import EncoderRow, Pooling, RowFailedError, RowRunner, task_of
from fastprompt.serving.encoders import Answer, EncoderEngine
from fastprompt.serving.request import OverloadedError

CLOSE = dict(rtol=1e-5, atol=1e-5)
NAMES = (None, "tone", "topic", "tuned", "long")


def run(engine: EncoderEngine, use: Callable[[EncoderEngine], Awaitable[Any]]) -> Any:
    return asyncio.run(served(engine, use))


def texts(count: int, vocabulary: int = 60, longest: int = 30) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def alone(model: PromptedModel, ids: list[int], prompt: str | None, **options: Any) -> Any:
    return model(torch.tensor([ids]), prompts=[prompt], **options)


def test_mixed_requests_under_concurrency_equal_the_model_alone():
    model, memory = classifier()
    requests = [(ids, NAMES[i % 5], i % 3 == 2) for i, ids in enumerate(texts(150))]

    async def use(engine: EncoderEngine) -> tuple[list[Answer], Any]:
        async def ask(ids: list[int], prompt: str | None, embed: bool) -> Answer:
            return await (engine.embed if embed else engine.classify)([ids], prompt)

        return await asyncio.gather(*(ask(*r) for r in requests)), engine.stats()

    answers, stats = run(engine(model, memory, max_wait=0.02, max_rows=32), use)
    for (ids, prompt, embed), answer in zip(requests, answers, strict=True):
        (value,) = answer.values
        if embed:
            hidden = alone(model, ids, prompt, output_hidden_states=True).hidden_states[-1][0]
            expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        else:
            expected = alone(model, ids, prompt).logits[0]
            assert value.shape == (len(answer.labels),)
        np.testing.assert_allclose(value, expected.numpy(), **CLOSE)
        assert answer.tokens == len(ids)
    assert stats.steps < len(requests) / 3 and stats.loaded.loads == 4
    assert stats.computed_rows == len(requests) and stats.padded_tokens <= stats.computed_tokens / 0.75
    assert (stats.waiting, stats.running, stats.waiting_by_prompt, stats.running_by_prompt) == (0, 0, {}, {})


def test_rows_of_all_prompts_and_heads_go_in_one_forward():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        for _ in range(2):  # the second time, all prompts are there
            await asyncio.gather(*(engine.classify([[7, 8, 9]], name) for name in NAMES if name != "tuned"))
        stats = engine.stats()
        assert (stats.rows, stats.mix) == (4, 4)

    run(engine(model, memory, max_wait=1.0, max_rows=4), use)


def test_a_request_of_many_texts_keeps_their_order_and_names_labels():
    model, memory = classifier()
    batch = texts(40)
    answer = run(engine(model, memory), lambda e: e.classify(batch, "topic"))
    assert answer.labels == ("film", "city", "dog", "play", "mat") and answer.activation == "softmax"
    assert answer.version == memory.current("topic").version and answer.tokens == sum(map(len, batch))
    for ids, value in zip(batch, answer.values, strict=True):
        np.testing.assert_allclose(value, alone(model, ids, "topic").logits[0].numpy(), **CLOSE)
    bare = run(engine(model, memory), lambda e: e.classify(batch[:1]))
    assert bare.labels == ("LABEL_0", "LABEL_1") and bare.version is None


def test_token_classifiers_answer_each_token():
    model, memory = tagger()
    requests = list(zip(texts(30), [None, "places", "marks"] * 10, strict=True))
    served = engine(model, memory, max_wait=0.02)
    answers = run(served, lambda e: asyncio.gather(*(e.classify([ids], name) for ids, name in requests)))
    for (ids, name), answer in zip(requests, answers, strict=True):
        expected = alone(model, ids, name).logits[0]
        assert answer.values[0].shape == (len(ids), {None: 2, "places": 5, "marks": 3}[name])
        np.testing.assert_allclose(answer.values[0], expected.numpy(), **CLOSE)


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_plain_encoders_pool_the_texts_own_tokens(kind: str, normalize: bool):
    torch.manual_seed(2)
    model, memory = PromptedModel(bert("SequenceClassification").bert).eval(), Memory()
    memory.put("style", make_prompt(model, "style", fp.PromptTuning(num_virtual_tokens=4)))
    batch = texts(9)
    answer = run(engine(model, memory), lambda e: e.embed(batch, "style", Pooling(kind, normalize)))
    assert task_of(model) == "embedding"
    for ids, value in zip(batch, answer.values, strict=True):
        hidden = alone(model, ids, "style").last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[kind]
        expected = expected / expected.norm() if normalize else expected
        np.testing.assert_allclose(value, expected.numpy(), **CLOSE)
    with pytest.raises(UnsupportedError, match="no classification head"):
        run(engine(model, memory), lambda e: e.classify(batch))


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "distilbert", "modernbert", "deberta_v2"])
def test_other_architectures(name: str):
    build = zoo.causal_classifier if name in zoo.CAUSAL else zoo.encoder
    changes = {"pad_token_id": 0} if name in zoo.CAUSAL else {}
    model, memory = PromptedModel(build(name, **changes)).eval(), Memory()
    config = fp.PromptTuning(num_virtual_tokens=3)
    memory.put("two", make_prompt(model, "two", config, num_labels=2))
    memory.put("six", make_prompt(model, "six", config, num_labels=6))
    requests = list(zip(texts(24, 90), [None, "two", "six"] * 8, strict=True))
    answers = run(
        engine(model, memory, max_wait=0.05),
        lambda e: asyncio.gather(*(e.classify([ids], prompt) for ids, prompt in requests)),
    )
    for (ids, prompt), answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer.values[0], alone(model, ids, prompt).logits[0].numpy(), **CLOSE)


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
        ([5] * 9, "prefix", ArgumentError, "finite"),
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


def test_a_replaced_prompt_is_served_at_once_and_requests_in_flight_keep_theirs():
    model, memory = classifier()
    ids = [7, 8, 9]
    old, old_version = alone(model, ids, "tone").logits[0].numpy(), memory.current("tone").version
    other = make_prompt(model, "other", fp.PTuningV2(num_virtual_tokens=2), labels=["x", "y", "z"])
    new = alone(model, ids, "other").logits[0].numpy()

    async def use(engine: EncoderEngine) -> None:
        slow = asyncio.ensure_future(engine.classify([ids], "tone"))
        while not engine.stats().waiting:
            await asyncio.sleep(0.005)
        memory.put("tone", other)
        fresh = await engine.classify([ids], "tone")
        before = await slow
        np.testing.assert_allclose(before.values[0], old, **CLOSE)
        np.testing.assert_allclose(fresh.values[0], new, **CLOSE)
        assert before.version == old_version and fresh.labels == ("x", "y", "z")
        del memory.prompts["tone"]
        with pytest.raises(PromptNotFoundError):
            await engine.classify([ids], "tone")
        assert engine.residency.names() == frozenset()
        memory.put("tone", other)
        np.testing.assert_allclose((await engine.classify([ids], "tone")).values[0], new, **CLOSE)

    run(engine(model, memory, max_wait=0.3), use)


def test_a_prompt_replaced_between_look_and_load_is_looked_up_again():
    model, memory = classifier()
    replacements = iter(["topic"])

    def replace(version: Any) -> None:
        if name := next(replacements, None):
            memory.prompts["tone"] = memory.prompts[name]

    memory.before_load = replace
    answer = run(engine(model, memory), lambda e: e.classify([[7, 8]], "tone"))
    np.testing.assert_allclose(answer.values[0], alone(model, [7, 8], "topic").logits[0].numpy(), **CLOSE)


def test_few_prompts_fit_and_the_rest_takes_turns():
    model, memory = classifier()
    requests = list(zip(texts(60), [n for n in NAMES if n] * 15, strict=True))

    async def use(engine: EncoderEngine) -> tuple[list[Answer], Any]:
        answers = await asyncio.gather(*(engine.classify([ids], name) for ids, name in requests))
        await asyncio.sleep(0.05)
        return answers, engine.stats().loaded

    served = engine(model, memory, max_prompts=2)
    answers, stats = run(served, use)
    for (ids, name), answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer.values[0], alone(model, ids, name).logits[0].numpy(), **CLOSE)
    assert stats.prompts <= 2 and stats.evictions >= 2 and stats.evictions == stats.loads - stats.prompts
    assert len(served.model.prompt_names) == stats.prompts


def test_pinned_prompts_stay_and_follow_their_name():
    model, memory = classifier()

    async def settled(engine: EncoderEngine, **expected: bool) -> None:
        while engine.residency.pinned() != expected:
            await asyncio.sleep(0.005)

    async def use(engine: EncoderEngine) -> None:
        residency = engine.residency
        residency.pin("tone")
        await settled(engine, tone=True)
        for name in ("topic", "tuned", "long") * 2:
            await engine.classify([[7]], name)
            assert residency.tier(memory.current("tone").version) == "device"
        with pytest.raises(BankFullError, match="unpin"):
            residency.pin("topic")
        with pytest.raises(PromptNotFoundError):
            residency.unpin("topic")
        old = memory.current("tone").version
        memory.put("tone", memory.prompts["topic"])
        residency.drop("tone")
        while residency.tier(memory.current("tone").version) == "disk" or residency.tier(old) == "device":
            await asyncio.sleep(0.005)
        await settled(engine, tone=True)
        del memory.prompts["tone"]
        residency.drop("tone")
        await settled(engine)
        assert residency.names() <= {"topic", "tuned", "long"}
        residency.pin("tuned")
        residency.unpin("tuned")
        await engine.classify([[7]], "long")
        assert all(not held.users for held in residency._held.values())

    run(engine(model, memory, max_prompts=2), use)


def test_budget_and_incompatible_prompts():
    model, memory = classifier()
    memory.put(
        "foreign", make_prompt(PromptedModel(zoo.encoder("bert")), "foreign", fp.PTuningV2(num_virtual_tokens=2))
    )
    memory.put("placed", fp.PTuning(num_virtual_tokens=2, in_place=True).build(model._info.spec))
    small = memory.current("placed").bytes
    memory.put("large", make_prompt(model, "large", fp.PTuningV2(num_virtual_tokens=900)))

    async def use(engine: EncoderEngine) -> None:
        for name, error in (
            ("large", BankFullError),
            ("foreign", IncompatiblePromptError),
            ("placed", UnsupportedError),
        ):
            for _ in range(2):
                with pytest.raises(error):
                    await engine.classify([[7]], name)
        assert len((await engine.classify([[7]], "tone")).values) == 1
        assert engine.stats().loaded.failures == 4 and engine.stats().loaded.prompts == 1

    run(engine(model, memory, max_prompt_bytes=small), use)


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
        await asyncio.sleep(0)
        assert engine.stats().waiting == 0 and engine._rows == 0
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


def test_backbones_that_are_not_served_here():
    with pytest.raises(UnsupportedError, match="AutoModel"):
        task_of(PromptedModel(zoo.causal("llama")))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        task_of(PromptedModel(zoo.seq2seq("t5")))
    with pytest.raises(ArgumentError, match="pad_token_id"):
        RowRunner(PromptedModel(zoo.causal_classifier("gpt2")))
