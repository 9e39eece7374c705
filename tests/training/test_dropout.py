"""Dropout inside prompts: the same in all passes and processes of a step, whatever their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases as cases
from process_cases import DROPPING, dropping, save_dropping

TOLERANCE = 1e-4  # two optimiser steps turn rounding into as much; another mask changes gradients by their own size


def check_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["draws"] == wanted["draws"] == [3] * len(DROPPING)
    for name, gradients in wanted["gradients"].items():
        for key, gradient in gradients.items():
            assert (found["gradients"][name][key] - gradient).norm() <= TOLERANCE * gradient.norm() > 0, (name, key)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return dropping({})


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 3}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_passes_of_a_step_drop_the_same(options: dict[str, Any], whole: dict[str, Any]) -> None:
    check_equal(dropping(options), whole)


def test_processes_drop_the_same(whole: dict[str, Any], tmp_path: Path) -> None:
    cases.in_two_processes(save_dropping, str(tmp_path / "found"), {})
    for rank in (0, 1):
        check_equal(torch.load(tmp_path / f"found.{rank}", weights_only=False), whole)


def test_other_steps_drop_otherwise(whole: dict[str, Any]) -> None:
    model = cases.causal()
    prompt = model.add_prompt("it", DROPPING["prefix_tuning"], seed=0)
    prompt.train()
    drawn = [prompt.encode() for _ in range(2)]
    assert not torch.equal(drawn[0] == 0, drawn[1] == 0)
    prompt.noise.draws = 0
    assert torch.equal(prompt.encode(), drawn[0])
