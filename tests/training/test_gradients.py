"""Every prompt gets, in a mixed batch, the gradient that it gets alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import training_cases as cases

import fastprompt as fp
from fastprompt.training.tasks.base import IGNORED, Features, TaskContext

TOLERANCE = 1e-5


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest over a prompt's parameters of |got - wanted| / |wanted|, by norms."""
    assert got.keys() == wanted.keys()
    return max(float((got[k] - wanted[k]).norm() / wanted[k].norm().clamp_min(1e-30)) for k in wanted)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the first step of each job by itself."""
    found = {}
    for given in cases.jobs(max_grad_norm=None, steps=1):
        found |= cases.gradients(cases.causal(), [given])
    assert all(g.norm() > 0 for grads in found.values() for g in grads.values())
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 40},  # more passes than there are examples
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=["plain", "checkpointing", "accumulation", "idle_passes", "both"],
)
def test_mixed_equals_alone(options: dict[str, Any], alone: dict[str, dict[str, torch.Tensor]]) -> None:
    mixed = cases.gradients(cases.causal(), cases.jobs(max_grad_norm=None, steps=1), **options)
    for method in cases.METHODS:
        assert relative_error(mixed[method], alone[method]) <= TOLERANCE, method


def test_mixed_equals_alone_under_bf16_autocast(alone: dict[str, dict[str, torch.Tensor]]) -> None:
    mixed = cases.gradients(cases.causal(), cases.jobs(max_grad_norm=None, steps=1), bf16=True)
    for given in cases.jobs(max_grad_norm=None, steps=1):
        by_itself = cases.gradients(cases.causal(), [given], bf16=True)[given.name]
        own_error = relative_error(by_itself, alone[given.name])  # what bf16 costs without neighbours
        assert 0 < own_error < 0.2
        assert relative_error(mixed[given.name], alone[given.name]) <= 2 * own_error, given.name


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 20},  # more passes than there are examples
    ],
    ids=["both", "idle_passes"],
)
def test_two_processes(options: dict[str, Any], alone: dict[str, dict[str, torch.Tensor]], tmp_path: Any) -> None:
    cases.in_two_processes(cases.save_gradients, str(tmp_path / "found"), options)
    first, second = (torch.load(tmp_path / f"found.{rank}") for rank in (0, 1))
    for method in cases.METHODS:
        assert relative_error(first["gradients"][method], alone[method]) <= TOLERANCE, method
        for key, weight in first["weights"][method].items():
            assert torch.equal(weight, second["weights"][method][key])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_heads_and_embedded_prompts_of_an_encoder(name: str) -> None:
    given = [
        cases.job(
            method, task=cases.Classify(classes), train=cases.texts(9, n, classes=classes), max_grad_norm=None, steps=1
        )
        for n, (method, classes) in enumerate(zip(("prompt_tuning", "p_tuning", "p_tuning_v2"), (2, 3, 5), strict=True))
    ]
    mixed = cases.gradients(cases.classifier(name), given)
    for one in given:
        by_itself = cases.gradients(cases.classifier(name), [one])[one.name]
        assert any(key.startswith("head.") for key in by_itself)
        assert relative_error(mixed[one.name], by_itself) <= TOLERANCE


def test_training_alone_and_with_others_gives_the_same_prompt() -> None:
    model = cases.causal()
    fp.train(model, cases.jobs(), options=cases.CPU)
    for given in cases.jobs():
        other = cases.causal()
        start = given.config.build(other._info.spec, seed=given.seed)
        fp.train(other, [given], options=cases.CPU)
        got, wanted = model.library[given.name].weights(), other.library[given.name].weights()
        moved = (wanted - start.weights()).abs().max()
        assert moved > 0
        # Adam divides by the gradient's own size, which rounding can turn where it is next to nothing
        assert (got - wanted).abs().max() <= 1e-3 * moved, given.name


@dataclass(frozen=True)
class Placed(cases.Follow):
    """The text with three virtual tokens inside."""

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        ids = example["ids"]
        row = [ids[0], -1, -2, *ids[1 : -self.targets], -3, *ids[-self.targets :]]
        return (Features(row, [IGNORED] * (len(row) - self.targets) + ids[-self.targets :]),)


def test_virtual_tokens_in_place() -> None:
    placed = cases.job(
        "p_tuning",
        task=Placed(),
        config=fp.PTuning(num_virtual_tokens=3, encoder="mlp", in_place=True),
        max_grad_norm=None,
        steps=1,
    )
    mixed = cases.gradients(cases.causal(), [placed, cases.job("prefix_tuning", steps=1)])["p_tuning"]
    alone = cases.gradients(cases.causal(), [placed])["p_tuning"]
    assert all(grad.norm() > 0 for grad in alone.values())
    assert relative_error(mixed, alone) <= TOLERANCE
