"""A Llama-like model with random weights, its prompts, and what they must compute by an oracle in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.attention_check import Truth
from bench.backbones import LlamaSize, llama

FULL = LlamaSize(16, 2048, 32, 8, 8192, 32000)
QUICK = LlamaSize(2, 64, 4, 2, 128, 100)
SLACK = 4.0  # bounds that PEFT and others may be off by
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Backbones:
    """The model that is timed, and the same weights in float32."""

    size: LlamaSize
    model: PreTrainedModel
    wide: PreTrainedModel


@cache
def backbones(device: str, quick: bool) -> Backbones:
    """In bfloat16; made once a process."""
    size = QUICK if quick else FULL
    model = llama(size, dtype=torch.bfloat16, device=device)
    return Backbones(size, model, copy.deepcopy(model).float())


@contextmanager
def implementation(name: str | None) -> Iterator[None]:
    """The ops run with this implementation, with what they choose for None."""
    if name is None:
        yield
        return
    with mock.patch.dict(os.environ, {"FASTPROMPT_IMPL": name}):
        yield


def truth(found: Callable[[PreTrainedModel], Named], both: Backbones) -> Truth:
    """What a computation over a backbone must give: plain PyTorch in float32, and its error in bfloat16 for the bound.

    The rule is that of the ops: twice the error of plain PyTorch, and a rounding step of the largest number.
    """
    with implementation("reference"):
        exact, usual = ({n: x.double() for n, x in found(m).items()} for m in (both.wide, both.model))
    eps = torch.finfo(torch.bfloat16).eps
    bound = {n: 2 * _gap(usual[n], x) + eps * x.abs().max().item() for n, x in exact.items()}
    return Truth(exact, bound)


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def numbered(loss: Tensor, gradients: list[Tensor]) -> Named:
    """A training step's results by name."""
    return {"loss": loss} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def greedy(new: int) -> Mapping[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
