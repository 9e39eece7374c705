"""The encoder engine: any mixture of prompts, heads and answers equals the model called alone."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from encoder_tools import NAMES, Memory, alone, classifier, engine, make_prompt, run, tagger, texts
from task_tools import bert

import fastprompt as fp
from fastprompt.errors import (
    ArgumentError,
    UnsupportedError,
)
from fastprompt.model import PromptedModel
from fastprompt.serving.encoder_rows import Pooling, RowRunner, task_of
from fastprompt.serving.encoders import Answer, EncoderEngine

CLOSE = dict(rtol=1e-5, atol=1e-5)


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


def test_backbones_that_are_not_served_here():
    with pytest.raises(UnsupportedError, match="AutoModel"):
        task_of(PromptedModel(zoo.causal("llama")))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        task_of(PromptedModel(zoo.seq2seq("t5")))
    with pytest.raises(ArgumentError, match="pad_token_id"):
        RowRunner(PromptedModel(zoo.causal_classifier("gpt2")))
