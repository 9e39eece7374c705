"""What host copies of prompts in 8 bits do to logits: the embedded backbone's, under exact and under rounded prefixes.

instructions   the demo tasks' hand-written instructions, compiled: keys and values as the backbone makes them;
               on random texts, and on the tasks' own inputs
normal         standard normal keys and values, on random texts
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import options, session
from fastprompt import Cartridge, PromptedModel, demo
from fastprompt.integrations.transformers.backbone import evaluating
from fastprompt.serving.host_copy import HostCopy
from fastprompt.spec import Prefix, flatten

STORAGES = ("int8", "fp8")
VIRTUAL = 16
_ROWS, _TOKENS = 8, 24  # of the random texts
_INPUTS = 32  # of each task


@dataclass(frozen=True)
class Change:
    """RMS of the logits' change over RMS of their spread; the share of `places` whose first choice stays the same."""

    error: float
    same: float
    places: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench bank-storage`."""
    options.add(parser, "out", threads=1)


def run(args: argparse.Namespace) -> int:
    """Prints and writes what was measured; 0, since the tests judge it."""
    torch.manual_seed(0)
    model = PromptedModel(demo.backbone())
    texts = random_texts(model)
    cases = {
        "instructions, random texts": (instructions(model), [texts]),
        "instructions, their inputs": (instructions(model), inputs()),
        "normal, random texts": (normal(model, 4), [texts]),
    }
    with session.opened(args, "bank-storage") as journal:
        for name, (prefixes, rows) in cases.items():
            for storage in STORAGES:
                found = change(model, prefixes, storage, rows)
                journal.write(
                    "rounding", prompts=name, storage=storage, error=found.error, same=found.same, places=found.places
                )
                print(f"  {name:28} {storage:5} {found.error:7.2%} of the spread, {found.same:6.1%} the same")
    return 0


def change(
    model: PromptedModel, prefixes: Sequence[Prefix], storage: str, texts: Sequence[Sequence[torch.Tensor]]
) -> Change:
    """What rounding prefixes does to the logits of `texts`: lists of rows `[N]`, one for each prefix or one for all."""
    errors, spread, same = [], [], []
    for i, prefix in enumerate(prefixes):
        rounded = HostCopy.pack(prefix, storage).prefix(model._info.layer_devices)
        for ids in texts[i % len(texts)]:
            exact, other = (_logits(model, each, ids) for each in (prefix, rounded))
            errors.append((exact - other).square().mean(-1))
            spread.append((exact - exact.mean(-1, keepdim=True)).square().mean(-1))
            same.append(exact.argmax(-1) == other.argmax(-1))
    ratio = (torch.cat(errors).mean() / torch.cat(spread).mean()).sqrt().item()
    kept = torch.cat(same)
    return Change(ratio, kept.double().mean().item(), kept.numel())


def _logits(model: PromptedModel, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
    """Of every token of a text `[N]`, in float64 `[N, V]`."""
    config = Cartridge(num_virtual_tokens=prefix.length)
    model.library.add("tried", config.restore(model._info.spec, flatten(prefix)))
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids[None], prompts="tried").logits[0].double()
    finally:
        model.remove_prompt("tried")
    return logits


def instructions(model: PromptedModel) -> list[Prefix]:
    """Each task's instruction, repeated or cut to `VIRTUAL` tokens, as a prefix."""
    tokenizer, made = demo.tokenizer(), []
    for task in demo.tasks():
        ids = torch.tensor(tokenizer(task.hand_written)["input_ids"])
        rows = model._info.model.get_input_embeddings().weight.detach()[ids.repeat(VIRTUAL)[:VIRTUAL]]
        with torch.no_grad(), evaluating(model._info.model):
            made.append(model._info.compile([rows])[0])
    return made


def normal(model: PromptedModel, count: int) -> list[Prefix]:
    """Prefixes of standard normal numbers in every layer."""

    def draw(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, VIRTUAL, dim)

    layers = model._info.spec.layers
    return [
        Prefix(
            tuple(range(len(layers))),
            tuple(draw(shape.kv_heads, shape.key_dim) for shape in layers),
            tuple(draw(shape.kv_heads, shape.value_dim) for shape in layers),
        )
        for _ in range(count)
    ]


def random_texts(model: PromptedModel) -> list[torch.Tensor]:
    """Rows of random tokens."""
    return list(torch.randint(5, model._info.spec.vocab_size, (_ROWS, _TOKENS)))


def inputs() -> list[list[torch.Tensor]]:
    """Texts of each task's test set."""
    tokenizer = demo.tokenizer()
    return [[torch.tensor(tokenizer(text)["input_ids"]) for text, _ in task.test[:_INPUTS]] for task in demo.tasks()]
