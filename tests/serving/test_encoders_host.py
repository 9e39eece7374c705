"""Prompts of encoders in host memory: not read again, gone with their name, and in 8 bits where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_tools import TOKENIZER, classifier, engine, run
from task_tools import bert

from fastprompt.errors import ArgumentError
from fastprompt.serving.encoder_options import EncoderOptions
from fastprompt.serving.encoders import EncoderEngine
from fastprompt.serving.host_copy import STORAGES, PromptCopy
from fastprompt.serving.launch import EngineConfig, make_engine

IDS = [[7, 8, 9, 10], [11]]
ONE_AT_A_TIME = {"max_prompts": 1}


def _asked(storage: str, names: list[str], **options: Any) -> tuple[list[np.ndarray], Any, list[str], EncoderEngine]:
    """Answers to `IDS` under prompts in turn, the counts then, and the names that were read from disk."""
    model, memory = classifier()
    read: list[str] = []
    memory.before_load = lambda version: read.append(version.name)

    async def use(served: EncoderEngine) -> tuple[list[np.ndarray], Any]:
        answers = [np.stack((await served.classify(IDS, name)).values) for name in names]
        return answers, served.stats().loaded

    made = engine(model, memory, storage=storage, **(ONE_AT_A_TIME | options))
    answers, counts = run(made, use)
    return answers, counts, read, made


@pytest.mark.parametrize("storage", STORAGES)
def test_what_left_the_model_is_not_read_again_and_answers_the_same(storage: str):
    names = ["tone", "tuned", "topic", "long"]
    answers, counts, read, made = _asked(storage, names * 3)
    assert read == names and (counts.loads, counts.host_hits, counts.host_prompts) == (4, 8, 4)
    for i, answer in enumerate(answers):
        assert np.array_equal(answer, answers[i % 4])  # the same numbers, wherever they came from
    exact, *_ = _asked("model", names)
    for name, rounded, want in zip(names, answers, exact, strict=False):
        changed = np.abs(rounded - want).max() / want.std()
        assert changed == 0.0 if storage == "model" else 0 < changed < 0.3, name
    version = made.registry.current("tone").version
    assert made.residency.tier(version) == "host"


def test_without_room_they_are_read_each_time():
    *_, counts, read, made = _asked("model", ["tone", "topic"] * 2, host_bytes=0)
    assert read == ["tone", "topic"] * 2 and (counts.host_prompts, counts.host_bytes) == (0, 0)
    assert made.residency.tier(made.registry.current("tone").version) == "disk"


def test_a_copy_is_a_prompt_of_its_own():
    model, _ = classifier()
    for name in ("tone", "tuned"):  # keys and values; virtual tokens
        prompt = model.library[name]
        sizes = {kind: PromptCopy.of(prompt, kind).packed.nbytes for kind in STORAGES}
        assert sizes["model"] == prompt.weights().nbytes
        assert sizes["int8"] == sizes["fp8"] < sizes["model"] / 2
        back = PromptCopy.of(prompt, "model").prompt()
        assert torch.equal(back.weights(), prompt.weights()) and back.labels == prompt.labels
        assert not any(p.requires_grad for p in back.parameters())
        for (n, a), (m, b) in zip(prompt.head.tensors().items(), back.head.tensors().items(), strict=True):
            assert n == m and torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_replaced_deleted_and_unloaded_prompts_leave_host_memory_too():
    model, memory = classifier()

    async def use(served: EncoderEngine) -> None:
        residency, first = served.residency, memory.current("tone").version
        for name in ("tone", "topic", "tuned"):
            await served.classify(IDS, name)
        assert residency.tier(first) == "host"
        memory.put("tone", memory.prompts["long"])
        residency.drop("tone")
        assert residency.tier(first) == "disk"
        second = memory.current("tone").version
        await served.classify(IDS, "tone")
        assert residency.tier(second) == "device"
        residency.unload("tone")
        residency.unload("topic")
        assert residency.tier(second) == "disk" == residency.tier(memory.current("topic").version)
        assert served.stats().loaded.host_prompts == 1

    run(engine(model, memory, **ONE_AT_A_TIME), use)


def test_the_command_says_how_they_lie_there(tmp_path: Path):
    bert("SequenceClassification").save_pretrained(tmp_path / "bert")
    TOKENIZER.save_pretrained(tmp_path / "bert")
    config = {"backbone": str(tmp_path / "bert"), "prompts": str(tmp_path / "prompts")}
    made = make_engine(EngineConfig(**config, storage="int8", host_bytes=12345))
    assert isinstance(made, EncoderEngine)
    assert (made.options.storage, made.options.host_bytes) == ("int8", 12345)
    with pytest.raises(ArgumentError, match="--storage"):
        make_engine(EngineConfig(**config, storage="int4"))
    with pytest.raises(ArgumentError, match="--kv-bytes"):
        make_engine(EngineConfig(**config, kv_bytes=1 << 20))
    with pytest.raises(ArgumentError, match="storage"):
        EncoderOptions(storage="int4")
