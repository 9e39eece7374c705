"""Two partial attentions merged: ours, and the formula in PyTorch, which is NaN where neither part saw a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.attention_baselines import Entry
from bench.ceilings import Work
from bench.op_cases import Inputs, OpCase
from fastprompt.ops import merge_states


@dataclass(frozen=True)
class MergeCase(OpCase):
    """States of `rows` rows of `queries` queries and `heads` heads of size `dim`."""

    op = "merge_states"
    rows: int
    queries: int
    heads: int
    dim: int = 64

    @property
    def name(self) -> str:
        return f"merge B{self.rows} N{self.queries} H{self.heads} D{self.dim}"

    def shrunk(self) -> MergeCase:
        return replace(self, rows=3, queries=min(self.queries, 5), heads=2, dim=8)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        gen = torch.Generator().manual_seed(0)
        out, lse = (self.rows, self.queries, self.heads, self.dim), (self.rows, self.heads, self.queries)
        shapes = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
        drawn = {name: torch.randn(*shape, generator=gen) for name, shape in shapes.items()}
        return {name: t.to(dtype) if t.dim() == 4 else t for name, t in drawn.items()}

    def ours(self, impl: str) -> Entry:
        return Entry(f"impl {impl}", lambda x: lambda: merge_states(**x, impl=impl), _named)

    def baselines(self) -> dict[str, Entry]:
        return {
            "formula": Entry("logaddexp, two weights, two products", _formula, _named),
            "interpolated": Entry("logaddexp, sigmoid, lerp", _interpolated, _named),
        }

    def work(self, x: Inputs) -> Work:
        """Two products and a sum an element; the weights are few beside them."""
        each, states = x["out_a"], x["lse_a"]
        return Work(3.0 * each.numel(), 3 * (each.numel() * each.element_size() + states.numel() * 4))


def _named(result: Any) -> dict[str, Tensor]:
    return {"out": result[0], "lse": result[1]}


def _formula(x: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    out_a, lse_a, out_b, lse_b = x["out_a"], x["lse_a"], x["out_b"], x["lse_b"]

    def run() -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        a, b = ((part - lse).exp().transpose(1, 2)[..., None].to(out_a.dtype) for part in (lse_a, lse_b))
        return a * out_a + b * out_b, lse

    return run


def _interpolated(x: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    out_a, lse_a, out_b, lse_b = x["out_a"], x["lse_a"], x["out_b"], x["lse_b"]

    def run() -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(lse_b - lse_a).transpose(1, 2)[..., None].to(out_a.dtype)
        return torch.lerp(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)

    return run


CASES = (MergeCase(32, 1, 16), MergeCase(128, 1, 32, 128), MergeCase(8, 128, 12))
