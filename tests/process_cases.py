"""What the tests of training let one of two processes do, or the only one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import training_cases as cases

import fastprompt as fp

DROPPING = {
    "prefix_tuning": fp.PrefixTuning(num_virtual_tokens=4, dropout=0.3),
    "p_tuning": fp.PTuning(num_virtual_tokens=3, encoder="mlp", encoder_dropout=0.4, encoder_hidden_size=8),
    "p_tuning_v2": fp.PTuningV2(num_virtual_tokens=3, reparameterization="mlp", hidden_size=8, dropout=0.3),
}


def dropping(options: dict[str, Any]) -> dict[str, Any]:
    """Gradients of the third step, and draws after it, of prompts with dropout; the last has one row in a step."""
    sizes = {"prefix_tuning": 4, "p_tuning": 3, "p_tuning_v2": 1}
    given = [
        cases.job(method, config=config, batch_size=sizes[method], max_grad_norm=None, schedule="constant", steps=3)
        for method, config in DROPPING.items()
    ]
    model = cases.causal()
    keeper = cases.Gradients(model, step=2)
    fp.train(model, given, options=cases.CPU | options, callbacks=[keeper])
    return {"gradients": keeper.found, "draws": [model.library[name].noise.draws for name in DROPPING]}


def save_dropping(path: str, options: dict[str, Any]) -> None:
    torch.save(dropping(options), f"{path}.{os.environ['RANK']}")


def compare(config: Path, output: Path, resume: bool = False) -> list[dict[str, Any]]:
    """The comparison of a config file, trained."""
    from fastprompt.training import train_file

    return train_file(config, output=output, resume=resume)["comparison"]


def save_comparison(config: Path, output: Path) -> None:
    """Compare, and once more from what is kept; each process writes what it got."""
    first = compare(config, output)
    torch.save([first, compare(config, output, resume=True)], f"{output}.{os.environ['RANK']}")
