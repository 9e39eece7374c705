"""Prompts of encoders come, change, stay pinned and leave; requests keep the version they began with."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from encoder_tools import NAMES, alone, classifier, engine, make_prompt, run, texts

import fastprompt as fp
from fastprompt.errors import (
    BankFullError,
    IncompatiblePromptError,
    PromptNotFoundError,
    UnsupportedError,
)
from fastprompt.model import PromptedModel
from fastprompt.prompts import PromptHead
from fastprompt.serving.encoders import Answer, EncoderEngine
from fastprompt.serving.request import RowFailedError

CLOSE = dict(rtol=1e-5, atol=1e-5)


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
        while any(held.users for held in residency._held.values()):  # "tuned" may still be on its way
            await asyncio.sleep(0.005)

    run(engine(model, memory, max_prompts=2), use)


def test_a_pinned_prompt_is_replaced_where_there_is_no_room_for_both():
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        engine.residency.pin("long")
        while not engine.residency.pinned()["long"]:
            await asyncio.sleep(0.005)
        memory.put("long", make_prompt(model, "longer", fp.PTuningV2(num_virtual_tokens=23)))
        engine.residency.drop("long")
        answer = await asyncio.wait_for(engine.classify([[7, 8]], "long"), 300)
        assert answer.version == memory.current("long").version
        while not engine.residency.pinned()["long"]:
            await asyncio.sleep(0.005)

    run(engine(model, memory, max_prompt_bytes=int(1.5 * memory.current("long").bytes)), use)


@pytest.mark.parametrize(
    "tensors",
    [
        {"pre_weight": torch.zeros(3, 3)},
        {"weight": torch.zeros(())},
        {"weight": torch.zeros(2, 7)},
        {"bias": torch.zeros(2)},
    ],
)
def test_a_head_that_does_not_fit_is_told_each_time_and_leaves_nothing(tensors: dict[str, torch.Tensor]):
    model, memory = classifier()
    broken = memory.put("broken@home", memory.prompts["tone"].collapse())
    broken.head, broken.labels = PromptHead("classifier", tensors), None

    async def use(engine: EncoderEngine) -> None:
        for _ in range(2):
            with pytest.raises(RowFailedError, match="'broken@home' cannot run on this backbone"):
                await engine.classify([[7, 8]], "broken@home")
            await engine.classify([[7, 8]], "tone")
        assert [name.partition("@")[0] for name in engine.model.prompt_names] == ["tone"]

    run(engine(model, memory), use)


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


def test_a_prompt_that_the_backbone_cannot_run_meets_nobody(monkeypatch: pytest.MonkeyPatch):
    model, memory = classifier()

    async def use(engine: EncoderEngine) -> None:
        forward = engine._runner._forward

        def fails(rows: Any) -> Any:
            if any(row.prompt and row.prompt.startswith("tone@") for row in rows):
                raise IndexError("index out of range in self")
            return forward(rows)

        monkeypatch.setattr(engine._runner, "_forward", fails)
        with pytest.raises(RowFailedError, match="prompt 'tone' cannot run on this backbone"):
            await engine.classify([[7]], "tone")
        assert len((await engine.classify([[7]], "tuned")).values) == 1
        assert not any(name.startswith("tone@") for name in engine.model.prompt_names)

    run(engine(model, memory), use)
