"""Calls of every op with tensors by name: the same call of an implementation, of the oracle, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench import checkout
from bench.measure import CheckFailed
from fastprompt import ops, reference
from fastprompt.plan import BatchPlan

OUTPUTS = {"prefix_attention": ("out", "lse"), "paged_prefix_attention": ("out", "lse"), "merge_states": ("out", "lse")}


@dataclass(frozen=True)
class Call:
    """Arguments of one call; gradients are taken of the tensors in `leaves`.

    `terms`: how many products at most make one number of a result. `queries`: of each row, where the op takes a plan
    that says which rows read a prefix together.
    """

    op: str
    tensors: Mapping[str, Tensor]
    leaves: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    terms: int = 1
    queries: tuple[int, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.tensors.values() if x.is_floating_point())

    def summed(self) -> dict[str, float]:
        """How many logits' gradients make one of a sink or a broadcast bias."""
        shared = [n for n in ("sinks", "bias", "prefix_bias") if self.op == "prefix_attention" and n in self.tensors]
        logits = self.tensors["q"][..., 0].numel() if shared else 0
        return {f"d{n}": logits / max(1, self.tensors[n].numel()) for n in shared}

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        return replace(self, tensors={name: function(x) for name, x in self.tensors.items()})

    def to(self, device: str) -> Call:
        return self.map(lambda x: x.to(device))

    def double(self) -> Call:
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def plan(self) -> dict[str, BatchPlan]:
        """The plan of the call, if it has one; of fixed size, so that another one fits in its place."""
        if self.queries is None:
            return {}
        start, length = self.tensors["prefix_start"], self.tensors["prefix_len"]
        rows = len(self.queries)
        plan = BatchPlan.build(start, length, capacity_rows=rows, queries=self.queries, device=start.device)
        return {"plan": plan}

    def ours(self, impl: str, seed: int = 1) -> dict[str, Tensor]:
        """What an implementation gives, outputs and gradients."""
        op, plan = getattr(ops, self.op), self.plan()
        return self.results(lambda **tensors: op(**tensors, **plan, impl=impl), seed)

    def oracle(self, seed: int = 1) -> dict[str, Tensor]:
        """What plain PyTorch gives in the precision that it takes."""
        return self.results(getattr(reference, self.op), seed)

    def results(self, function: Callable[..., Any], seed: int = 1) -> dict[str, Tensor]:
        """Outputs, and gradients of a random function of them."""
        leaves = {n: self.tensors[n].detach().requires_grad_() for n in self.leaves}
        with torch.set_grad_enabled(bool(leaves)):
            found = function(**(dict(self.tensors) | leaves), **self.settings)
            outputs = found if isinstance(found, tuple) else (found,)
            named = dict(zip(OUTPUTS.get(self.op, ("out",)), outputs, strict=True))
            if not leaves:
                return named
            loss = sum(_weighted(x, seed + i) for i, x in enumerate(outputs))
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            named[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
        return {name: x.detach() for name, x in named.items()}


def _weighted(x: Tensor, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=gen).to(x)
    return (x.masked_fill(x.isinf(), 0.0) * weights).sum()


@dataclass(frozen=True)
class Right:
    """What a call must give, and how far from it a result may be, by name."""

    exact: Mapping[str, Tensor]
    bound: Mapping[str, float]

    @classmethod
    def of(cls, call: Call) -> Right:
        """In float64, with the bounds that the tests hold every implementation to."""
        checkout.find_cases()
        from cpu_cases import bounds, plain

        exact = call.double().oracle()
        usual = None if call.dtype == torch.float32 else plain(call.oracle)
        return cls(exact, bounds(exact, usual, call.dtype, call.terms, call.summed()))

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Each result's error in units of its bound; `CheckFailed` where it is beyond that or not finite."""
        shares = {}
        for name, want in self.exact.items():
            got = found[name]
            if got.shape != want.shape:
                raise CheckFailed(f"{name} has shape {list(got.shape)}, expected {list(want.shape)}")
            if not torch.equal(got.isfinite(), want.isfinite()):
                raise CheckFailed(f"{name} is not finite where it should be: {int(got.isnan().sum())} NaN")
            gap = (got.double() - want).masked_fill(~want.isfinite(), 0.0).abs()
            shares[name] = gap.max().item() / self.bound[name] if gap.numel() else 0.0
            if not shares[name] <= 1:
                raise CheckFailed(f"{name} is off by {shares[name]:.2f} times its bound of {self.bound[name]:.2e}")
        return shares
