"""What the tests of serving share: a tiny backbone, prompts of every method on disk, and engines over them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastprompt as fp
from fastprompt import store
from fastprompt.model import PromptedModel
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.engine import Engine
from fastprompt.serving.request import Generation, SamplingParams

VOCABULARY = 101
METHODS = (
    fp.PrefixTuning(num_virtual_tokens=7, init_std=1.0),
    fp.PromptTuning(num_virtual_tokens=4),
    fp.PTuningV2(num_virtual_tokens=33, init_std=1.0),
    fp.PTuning(num_virtual_tokens=3),
    fp.PrefixTuning(num_virtual_tokens=1, init_std=1.0),
)


def backbone(seed: int = 0, **options):
    """A Llama of two layers that decides clearly: greedy answers do not hang on rounding."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=2, **options)
    return LlamaForCausalLM(config).eval()


def save_prompts(folder: Path, count: int = len(METHODS), seed: int = 0) -> list[str]:
    """Prompts p0, p1, ... of all methods in turn, for `backbone()`."""
    model = PromptedModel(backbone())
    for i in range(count):
        model.add_prompt(f"p{i}", METHODS[i % len(METHODS)], seed=seed + i)
        store.save_prompt(folder / f"p{i}", model.remove_prompt(f"p{i}"), overwrite=True)
    return [f"p{i}" for i in range(count)]


def engine(folder: Path, **options) -> Engine:
    """An engine over the prompts in a folder."""
    small = {"block_size": 4, "max_model_len": 256, "device_bytes": 2**22}
    return build_engine(backbone(), folder, EngineOptions(**(small | options)))


def texts(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Random texts of 1 to `longest` tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(text, prompt=None, new: int = 12, **params) -> Generation:
    """A request for the likeliest tokens."""
    return Generation(text, prompt, SamplingParams(max_tokens=new, temperature=0.0, **params))


def run(engine: Engine, requests, each_step=None) -> dict[tuple[str, int], list]:
    """All requests to their end; the events of every choice. `each_step` is called with the events so far."""
    for request in requests:
        engine.add(request)
    events: dict[tuple[str, int], list] = {}
    steps = 0
    while engine.busy:
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
        steps += 1
        assert steps < 100_000, "the engine makes no progress"
        if each_step is not None:
            each_step(events)
    return events


def tokens(events) -> list[int]:
    """All tokens of a choice's events."""
    return [token for event in events for token in event.tokens]


def alone(folder: Path, text, prompt, new: int = 12) -> list[int]:
    """What `PromptedModel.generate` says, without the end token."""
    model = PromptedModel(backbone())
    if prompt is not None:
        model.load_prompt(prompt, folder / prompt)
    ids = torch.tensor([text])
    out = model.generate(ids, prompts=prompt, max_new_tokens=new, do_sample=False, pad_token_id=0)
    found = out[0, len(text) :].tolist()
    return found[:-1] if found[-1] == 2 else found


def mixed(count: int, seed: int = 0, new: int = 12) -> list[Generation]:
    """Greedy requests under p0 to p5 and under none, in turn."""
    names = [None, "p0", "p1", "p2", "p3", "p4", "p5"]
    return [greedy(text, names[i % len(names)], new) for i, text in enumerate(texts(count, seed))]


def same_as_alone(folder: Path, requests, events) -> None:
    """Assert that every request was answered as `PromptedModel.generate` answers it by itself."""
    for request in requests:
        found = events[request.request_id, 0]
        assert tokens(found) == alone(folder, request.token_ids, request.prompt, request.params.max_tokens)
        assert found[-1].finish_reason in ("stop", "length")
