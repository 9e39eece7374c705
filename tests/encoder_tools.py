"""Small encoders, prompts for them and a registry in memory, for the tests of serving."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from task_tools import bert, bert_tokenizer

import fastprompt as fp
from fastprompt.errors import PromptChangedError, PromptNotFoundError
from fastprompt.model import PromptedModel
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.batcher import BatchLimits
from fastprompt.serving.encoder_options import EncoderOptions
from fastprompt.serving.encoders import EncoderEngine
from fastprompt.serving.registry import PromptVersion
from fastprompt.store import prompt_digest

TOKENIZER = bert_tokenizer()
NAMES = (None, "tone", "topic", "tuned", "long")  # of `classifier`, and the bare backbone
TAGS = ("O", "B-city", "I-city", "B-person", "I-person")


class Memory:
    """A registry of built prompts; `before_load` is called on the reading thread."""

    def __init__(self) -> None:
        self.prompts: dict[str, SoftPrompt] = {}
        self.before_load: Callable[[PromptVersion], None] = lambda version: None
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self.prompts

    def put(self, name: str, prompt: SoftPrompt) -> SoftPrompt:
        self.prompts[name] = prompt
        return prompt

    def current(self, name: str) -> PromptVersion:
        if name not in self.prompts:
            raise PromptNotFoundError(f"prompt {name!r} is not there")
        prompt = self.prompts[name]
        size = sum(p.numel() * 4 for p in prompt.parameters())
        return PromptVersion(
            name, prompt_digest(prompt), prompt.config.method, prompt.kind, prompt.length, size, prompt.labels,
            prompt.task_type, Path(name), 0.0,
        )  # fmt: skip

    def load(self, version: PromptVersion) -> SoftPrompt:
        self.before_load(version)
        with self._lock:
            prompt = self.prompts.get(version.name)
            if prompt is None or prompt_digest(prompt) != version.version:
                raise PromptChangedError(f"prompt {version.name!r} has changed")
            return prompt.collapse()


def make_prompt(model: PromptedModel, name: str, config: Any, **options: Any) -> SoftPrompt:
    """A prompt with visible effect, built by the model's own means and added to it under its name."""
    prompt = model.add_prompt(name, config, **options)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        prompt.touch()
    return prompt


def classifier() -> tuple[PromptedModel, Memory]:
    """A sequence classifier with prompts of several methods, lengths and label sets, by name in both."""
    model, memory = PromptedModel(bert("SequenceClassification")).eval(), Memory()
    prefix, tokens = fp.PTuningV2, fp.PromptTuning
    for name, config, labels in (
        ("tone", prefix(num_virtual_tokens=5), ["bad", "good"]),
        ("topic", prefix(num_virtual_tokens=1, layers=[1]), ["film", "city", "dog", "play", "mat"]),
        ("tuned", tokens(num_virtual_tokens=7), ["no", "yes", "maybe"]),
        ("long", prefix(num_virtual_tokens=23), None),
    ):
        memory.put(name, make_prompt(model, name, config, labels=labels))
    return model, memory


def tagger() -> tuple[PromptedModel, Memory]:
    """A token classifier with two prompts."""
    model, memory = PromptedModel(bert("TokenClassification")).eval(), Memory()
    memory.put("places", make_prompt(model, "places", fp.PTuningV2(num_virtual_tokens=3), labels=list(TAGS)))
    memory.put("marks", make_prompt(model, "marks", fp.PTuningV2(num_virtual_tokens=6), num_labels=3))
    return model, memory


def engine(model: PromptedModel, memory: Any, **options: Any) -> EncoderEngine:
    """An engine over the same backbone, with a library of its own."""
    limits = {name: options.pop(name) for name in list(options) if name in BatchLimits.__dataclass_fields__}
    served = PromptedModel(model.backbone, TOKENIZER)
    return EncoderEngine(
        served, TOKENIZER, memory, name="bert", options=EncoderOptions(BatchLimits(**limits), threads=1, **options)
    )


async def served(engine: EncoderEngine, use: Callable[[EncoderEngine], Awaitable[Any]]) -> Any:
    """What `use` gives while the engine runs."""
    await engine.start()
    try:
        return await use(engine)
    finally:
        await engine.close()


def run(engine: EncoderEngine, use: Callable[[EncoderEngine], Awaitable[Any]]) -> Any:
    return asyncio.run(served(engine, use))


def texts(count: int, vocabulary: int = 60, longest: int = 30) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randrange(5, vocabulary) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def alone(model: PromptedModel, ids: list[int], prompt: str | None, **options: Any) -> Any:
    return model(torch.tensor([ids]), prompts=[prompt], **options)
