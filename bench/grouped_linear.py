"""A linear layer of its own for each row: ours, and the ways it is written in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention_baselines import Entry
from bench.ceilings import Work
from bench.op_cases import Inputs, OpCase
from fastprompt.ops import grouped_linear


@dataclass(frozen=True)
class LinearCase(OpCase):
    """`rows` of `tokens` vectors of `hidden` numbers, each row under one of so many heads of `classes` classes."""

    op = "grouped_linear"
    rows: int
    heads: int
    tokens: int
    hidden: int
    classes: int

    @property
    def name(self) -> str:
        return f"linear B{self.rows} heads{self.heads} N{self.tokens} E{self.hidden} C{self.classes}"

    def shrunk(self) -> LinearCase:
        return replace(self, rows=4, heads=min(self.heads, 3), tokens=min(self.tokens, 5), hidden=16, classes=3)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        gen = torch.Generator().manual_seed(0)
        width = self.heads * self.classes
        shapes = {"x": (self.rows, self.tokens, self.hidden), "weight": (width, self.hidden), "bias": (width,)}
        drawn = {name: torch.randn(*shape, generator=gen).to(dtype) for name, shape in shapes.items()}
        start = torch.tensor([t * self.classes for t in self._head_of()], dtype=torch.int32)
        return drawn | {"start": start, "length": torch.full_like(start, self.classes)}

    def ours(self, impl: str) -> Entry:
        return Entry(f"impl {impl}", lambda x: lambda: grouped_linear(**x, max_out=self.classes, impl=impl), _named)

    def baselines(self) -> dict[str, Entry]:
        return {
            "gathered": Entry("weights gathered by row, one batched product", self._gathered, _named),
            "ready": Entry("the same, weights gathered before", self._ready, _named),
            "by head": Entry("one product a head", self._by_head, _named),
            "all heads": Entry("one product with all heads, each row's columns gathered", self._all_heads, _named),
        }

    def work(self, x: Inputs) -> Work:
        products = self.rows * self.tokens * self.classes
        numbers = x["x"].numel() + x["weight"].numel() + x["bias"].numel() + products
        return Work(2.0 * products * self.hidden, numbers * x["x"].element_size())

    def _head_of(self) -> list[int]:
        return [b * 7 % self.heads for b in range(self.rows)]

    def _stacked(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = x["weight"].view(self.heads, self.classes, -1), x["bias"].view(self.heads, 1, self.classes)
        return weight, bias, torch.tensor(self._head_of())

    def _gathered(self, x: Inputs) -> Callable[[], Tensor]:
        weight, bias, heads = self._stacked(x)
        return lambda: torch.baddbmm(bias.index_select(0, heads), x["x"], weight.index_select(0, heads).mT)

    def _ready(self, x: Inputs) -> Callable[[], Tensor]:
        weight, bias, heads = self._stacked(x)
        weights, biases = weight[heads], bias[heads]
        return lambda: torch.baddbmm(biases, x["x"], weights.mT)

    def _by_head(self, x: Inputs) -> Callable[[], Tensor]:
        weight, bias, heads = self._stacked(x)
        rows = [(t, torch.nonzero(heads == t).flatten()) for t in sorted(set(self._head_of()))]

        def run() -> Tensor:
            out = x["x"].new_empty(self.rows, self.tokens, self.classes)
            for t, here in rows:
                out.index_copy_(0, here, F.linear(x["x"].index_select(0, here), weight[t], bias[t, 0]))
            return out

        return run

    def _all_heads(self, x: Inputs) -> Callable[[], Tensor]:
        columns = x["start"].long()[:, None, None] + torch.arange(self.classes)
        columns = columns.expand(-1, self.tokens, -1)
        return lambda: F.linear(x["x"], x["weight"], x["bias"]).gather(2, columns)


def _named(result: Any) -> dict[str, Tensor]:
    return {"out": result}


CASES = (LinearCase(32, 10, 1, 384, 15), LinearCase(32, 4, 64, 768, 9), LinearCase(128, 128, 1, 1024, 2))
