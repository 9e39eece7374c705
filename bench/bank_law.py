"""What a forward under mixed prompts costs by how many prompts lie in the bank: the same prompts among ever more."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import fastprompt as fp
from bench import measure
from bench.backbones import LlamaSize, llama, random_text, twin
from bench.main_job import LOGITS, add_prefixes, shuffled
from bench.measure import Agreement, Contestant
from bench.op_run import OURS, SAMPLE, Settings, spread

_ROWS, _VIRTUAL = 16, 16
_BACKBONE = LlamaSize(2, 64, 2, 1, 128, 100)
_COUNTS = {False: (16, 64, 256, 1024, 4096), True: (16, 20, 24)}
ABOUT = f"a forward of {_ROWS} rows of one token under {_ROWS} of so many prompts of {_VIRTUAL} virtual tokens"


def measure_all(settings: Settings) -> dict[int, dict[str, Any]]:
    """A point for every number of prompts, all of them in one interleaved run."""
    bare = llama(_BACKBONE)
    text = random_text(_BACKBONE, _ROWS, 1)
    logits = Agreement("logits, few and many prompts in the bank", LOGITS)
    contestants: dict[str, Contestant] = {}
    sizes: dict[int, int] = {}
    first: list[dict[str, torch.Tensor]] = []
    for count in _COUNTS[settings.quick]:
        model = fp.PromptedModel(twin(bare))
        used = shuffled(add_prefixes(model, count, _VIRTUAL))[:_ROWS]
        first = first or [model.library[name].state_dict() for name in used]
        for name, state in zip(used, first, strict=True):
            model.library[name].load_state_dict(state)
        run = _forward(model, text, used)
        logits.check(run())
        calls = measure.calls_for(run, SAMPLE[settings.quick])
        contestants[str(count)] = Contestant(run, logits.check, calls=calls)
        sizes[count] = model.library.bank.stats().bytes
    samples = measure.interleave(contestants, settings.rounds)
    logits.finish()
    points = {}
    for count, size in sizes.items():
        runs = samples[str(count)]
        times = {clock: asdict(spread(runs, clock)) for clock in ("wall", "cpu")}
        points[count] = {
            "case": f"{count} prompts", "dtype": "fp32", "times": {OURS: times},
            "quiet": all(run.quiet for run in runs), "worst": logits.worst, "allocated": {"bank": size},
        }  # fmt: skip
    return points


def _forward(model: fp.PromptedModel, text: dict[str, Any], prompts: list[str]) -> Any:
    return lambda: model(**text, prompts=prompts, use_cache=False).logits
