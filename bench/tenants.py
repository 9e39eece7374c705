"""Tenants of a server over the embedded backbone: their prompts on disk, what they ask, and the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fastprompt as fp
from bench.backbones import INIT_STD, greedy
from fastprompt import demo

NAME = "embedded"  # of the bare backbone
TEXTS = ("Anna lives in", "The capital of", "Tom works as a", "Where does", "One cat, two", "The language of")
PREFIX = fp.PrefixTuning(num_virtual_tokens=16, init_std=INIT_STD)


def save(
    folder: Path, count: int, configs: Sequence[fp.PromptConfig] = (PREFIX,), peft: Path | None = None
) -> list[str]:
    """Random prompts, each its own, of the methods in turn; with `peft` as adapters of PEFT there too. Their names."""
    model = fp.PromptedModel(demo.backbone())
    names = [f"tenant-{i:04}" for i in range(count)]
    for i, name in enumerate(names):
        model.add_prompt(name, configs[i % len(configs)], seed=i)
        model.save_prompt(name, folder / name)
        if peft is not None:
            model.save_prompt(name, peft / name, format="peft")
        model.remove_prompt(name)
    return names


def answers(folder: Path, names: Sequence[str], new: int) -> dict[tuple[str, str], str]:
    """What `PromptedModel.generate` says to every text, under prompts by name and without one under `NAME`."""
    tokenizer, model = demo.tokenizer(), fp.PromptedModel(demo.backbone())
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="left")
    found = {}
    for name in names:
        if name != NAME:
            model.load_prompt(name, folder / name)
        out = model.generate(**batch, prompts=None if name == NAME else name, **greedy(new))
        if name != NAME:
            model.remove_prompt(name)
        made = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        found |= {(name, text): answer for text, answer in zip(TEXTS, made, strict=True)}
    return found
