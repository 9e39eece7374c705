"""The tensors of a case: own keys and an arena as the op takes them, and what every other contestant needs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bench.attention_cases import Case
from fastprompt.plan import BatchPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """One call's arguments; `mask` is over a row's longest possible prefix and its own keys, None if all is seen.

    `q [B, Hq, N, D]`, `k`, `v` `[B, Hkv, S, D]`, `prefix_k`, `prefix_v` `[Hkv, T, D]`, int32 `[B]` `start`, `length`
    and `first` (own keys before it are padding; None without), `dout [B, N, Hq, D]`, `mask [B or 1, 1, N, P + S]` with
    P = `longest`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    start: Tensor
    length: Tensor
    first: Tensor | None
    mask: Tensor | None
    dout: Tensor
    longest: int
    plan: BatchPlan

    def to(self, device: str | torch.device) -> Inputs:
        return self._map(lambda x: x.to(device))

    def double(self) -> Inputs:
        return self._map(lambda x: x.double() if x.is_floating_point() else x)

    def copy(self) -> Inputs:
        """The same numbers in other memory, laid out alike; the mask, which layers share, is shared."""
        return replace(self._map(torch.Tensor.clone), mask=self.mask)

    def part(self, rows: slice, heads: slice) -> Inputs:
        """Some rows and kv heads of it."""
        group = self.q.shape[1] // self.k.shape[1]
        q_heads = slice(heads.start * group, heads.stop * group)
        mask = self.mask
        return Inputs(
            self.q[rows, q_heads], self.k[rows, heads], self.v[rows, heads],
            self.prefix_k[heads], self.prefix_v[heads], self.start[rows], self.length[rows],
            None if self.first is None else self.first[rows],
            mask[rows] if mask is not None and mask.shape[0] > 1 else mask,
            self.dout[rows, :, q_heads], self.longest, BatchPlan.build(self.start[rows], self.length[rows]),
        )  # fmt: skip

    def parts(self, elements: int) -> Iterator[tuple[slice, slice, Inputs]]:
        """All of it in parts whose attention weights and expanded keys stay near `elements`."""
        rows, heads = self.q.shape[0], self.k.shape[1]
        length = self.longest + self.k.shape[2]
        group = self.q.shape[1] // heads
        units = max(1, elements // (group * length * (self.q.shape[2] + self.q.shape[3])))
        heads_each = min(heads, units)
        rows_each = max(1, units // heads_each)
        for b in range(0, rows, rows_each):
            for h in range(0, heads, heads_each):
                at = slice(b, min(b + rows_each, rows)), slice(h, min(h + heads_each, heads))
                yield *at, self.part(*at)

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, P + S, D]` concatenated, differentiable; shorter prefixes are filled up."""
        p = torch.arange(self.longest, device=self.start.device)
        token = (self.start[:, None] + p).clamp(max=max(self.prefix_k.shape[1] - 1, 0)).long()
        k, v = (
            torch.cat([arena[:, token].transpose(0, 1), own], 2)
            for arena, own in ((self.prefix_k, self.k), (self.prefix_v, self.v))
        )
        return k, v

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(x) for name, x in held.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


def build(case: Case, dtype: str, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random tensors of a case; the same for a seed on a kind of device."""
    gen = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device).to(DTYPES[dtype])

    def by_head(heads: int, tokens: int) -> Tensor:
        if case.strided:
            return draw(case.rows, tokens, heads, case.dim).transpose(1, 2)
        return draw(case.rows, heads, tokens, case.dim)

    q_heads, kv_heads = case.heads
    lengths, prompts = case.lengths(), case.prompt_of()
    starts = [sum(lengths[:t]) for t in range(len(lengths))]
    start, length, first = (
        torch.tensor(values, dtype=torch.int32)
        for values in ([starts[t] for t in prompts], [lengths[t] for t in prompts], case.first_keys())
    )
    return Inputs(
        by_head(q_heads, case.queries), by_head(kv_heads, case.keys), by_head(kv_heads, case.keys),
        draw(kv_heads, sum(lengths), case.dim), draw(kv_heads, sum(lengths), case.dim), start, length,
        first if case.padded else None, visible(case, length, first),
        draw(case.rows, case.queries, q_heads, case.dim), max(lengths), BatchPlan.build(start, length),
    ).to(device)  # fmt: skip


def visible(case: Case, length: Tensor, first: Tensor) -> Tensor | None:
    """`[B or 1, 1, N, P + S]`, true where a query sees a key; None where all do."""
    width = int(length.max())
    p, j = torch.arange(width), torch.arange(case.keys)
    i = torch.arange(case.queries)[:, None] + case.keys - case.queries
    shift = (length - first)[:, None]  # position of own index 0
    real = torch.cat([p < length[:, None], j >= first[:, None]], 1)[:, None, :]  # [B, 1, P + S]
    before = j <= i if case.causal else torch.ones(case.queries, case.keys, dtype=torch.bool)
    mask = real & torch.cat([torch.ones(case.queries, width, dtype=torch.bool), before], 1)
    if case.window is not None:
        position = torch.cat([p.expand(case.rows, -1), j + shift], 1)[:, None, :]
        distance = i + shift[:, :, None] - position
        mask = mask & ((distance if case.causal else distance.abs()) < case.window)
    if mask.all():
        return None
    return (mask[:1] if (mask == mask[:1]).all() else mask)[:, None]
