"""Errors of the contestants against float64, held to the ops' bound: twice plain PyTorch's, and a rounding step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.attention_cases import Case
from bench.attention_inputs import Inputs
from bench.measure import CheckFailed
from fastprompt import reference

_ELEMENTS = 1 << 24  # of attention weights and expanded keys that are held at once
_LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")


@dataclass(frozen=True)
class Truth:
    """By name: results in float64, and how far from them one may be."""

    exact: dict[str, Tensor]
    bound: dict[str, float]

    def errors(self, who: str, found: Mapping[str, Tensor], slack: float = 1.0) -> dict[str, float]:
        """Each result's largest error in units of its bound; `CheckFailed` where one exceeds `slack`."""
        errors = {}
        for name, value in found.items():
            want = self.exact[name]
            if value.shape != want.shape:
                raise CheckFailed(f"{who}: {name} has shape {list(value.shape)}, expected {list(want.shape)}")
            error = (value.double() - want).abs().max().item()
            errors[name] = error / self.bound[name]
            if not errors[name] <= slack:  # NaN fails too
                raise CheckFailed(f"{who}: {name} is off by {error:.2e}, the bound is {slack * self.bound[name]:.2e}")
        return errors


def truth(case: Case, inputs: Inputs) -> Truth:
    """What a case must give: the oracle in float64, and plain PyTorch in the dtype for the bound."""
    exact = _whole(case, inputs.double(), _oracle)
    return bounded(exact, _whole(case, inputs, _plain), inputs.q.dtype)


def bounded(exact: Mapping[str, Tensor], usual: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Truth:
    """The ops' bound around results in float64, from those of plain PyTorch in a dtype, by default in their own."""
    bound = {}
    for name, want in exact.items():
        step = torch.finfo(dtype or usual[name].dtype).eps * want.abs().max().item()
        bound[name] = 2 * (usual[name].double() - want).abs().max().item() + step
    return Truth(dict(exact), bound)


def _whole(case: Case, inputs: Inputs, attend: Callable[[Case, Inputs, list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """The output, and for training the gradients, put together from parts that fit into memory."""
    rows, heads, queries, dim = inputs.q.shape
    whole = {"out": inputs.q.new_empty(rows, queries, heads, dim)}
    if case.backward:
        wide = torch.float64  # a prefix's gradient is summed over the parts here, which is no error of theirs
        whole |= {f"d{n}": torch.zeros_like(getattr(inputs, n), dtype=wide) for n in _LEAVES}
    group = heads // inputs.k.shape[1]
    for row, head, part in inputs.parts(_ELEMENTS):
        q_head = slice(head.start * group, head.stop * group)
        leaves = [getattr(part, name).detach().requires_grad_(case.backward) for name in _LEAVES]
        with torch.set_grad_enabled(case.backward):
            out = attend(case, part, leaves)
        whole["out"][row, :, q_head] = out.detach()
        if case.backward:
            at = [(row, q_head), (row, head), (row, head), (head,), (head,)]
            for name, place, grad in zip(_LEAVES, at, torch.autograd.grad(out, leaves, part.dout), strict=True):
                whole[f"d{name}"][place] += grad
    return whole


def _oracle(case: Case, x: Inputs, leaves: list[Tensor]) -> Tensor:
    q, k, v, prefix_k, prefix_v = leaves
    out = reference.prefix_attention(
        q, k, v, prefix_k, prefix_v, x.start, x.length, causal=case.causal, window=case.window, kv_start=x.first
    )
    assert isinstance(out, Tensor)
    return out


def _plain(case: Case, x: Inputs, leaves: list[Tensor]) -> Tensor:
    """The same attention as it is usually written, all of it in the dtype of the inputs."""
    changed: dict[str, Any] = dict(zip(_LEAVES, leaves, strict=True))
    keys, values = replace(x, **changed).expanded()
    q, group = leaves[0], case.heads[0] // case.heads[1]
    logits = q @ keys.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5
    logits = logits if x.mask is None else logits.masked_fill(~x.mask, -torch.inf)
    return (logits.softmax(-1) @ values.repeat_interleave(group, 1)).transpose(1, 2)
