"""One call of prefix attention with its index arguments on the host, and what each query may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fastprompt._eager.groups import Groups
from fastprompt.arguments import PrefixAttention
from fastprompt.errors import ArgumentError

INF = float("inf")


@dataclass(frozen=True)
class Problem:
    """The tensors of a call, its groups, and its rows' bounds as lists.

    `k`, `v` and `bias` are cut to the own keys `first .. first + k.shape[2] - 1` that some row really has; `start`,
    `end` and `query` are each row's real own keys and first query, counted from `first`. `shift` is the
    position of that counting's zero.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    groups: Groups
    sinks: Tensor | None
    bias: Tensor | None
    prefix_bias: Tensor | None
    first: int
    start: list[int]
    end: list[int]
    query: list[int]
    shift: list[int]
    causal: bool
    scale: float
    window: int | None
    softcap: float | None

    @cached_property
    def padded(self) -> bool:
        """Whether `k` holds anything that is not a real key of its row."""
        return any(s > 0 for s in self.start) or any(e < self.k.shape[2] for e in self.end)

    @cached_property
    def causal_square(self) -> bool:
        """Whether each query sees exactly the own keys up to its own index, starting with the first."""
        inside = self.window is None or self.window >= self.q.shape[2]
        return self.causal and inside and not self.padded and self.q.shape[2] == self.k.shape[2] and not any(self.query)

    @cached_property
    def own_mask(self) -> Tensor | None:
        """`[B or 1, 1, N, S]`, true where an own key is seen; None when all are."""
        queries, size = self.q.shape[2], self.k.shape[2]
        if not self.query or not size or not (self.padded or self._hides_own(queries, size)):
            return None
        bounds = list(zip(self.start, self.end, self.query, strict=True))
        bounds = bounds[:1] if all(b == bounds[0] for b in bounds) else bounds
        table = torch.tensor(bounds, device=self.q.device).T[:, :, None, None]
        start, end, query = table.unbind()
        i = query + torch.arange(queries, device=self.q.device)[:, None]
        j = torch.arange(size, device=self.q.device)
        mask = (j >= start) & (j < end)
        if self.causal:
            mask = mask & (j <= i)
        if self.window is not None:
            mask = mask & (i - j < self.window)
            if not self.causal:
                mask = mask & (j - i < self.window)
        return mask.expand(-1, queries, -1)[:, None]

    @cached_property
    def window_cuts_prefix(self) -> bool:
        """Whether a query is too far from a prefix key to see it."""
        if self.window is None or not self.groups.width:
            return False
        last = self.q.shape[2] - 1
        far = max(p + i + last for p, i in zip(self.shift, self.query, strict=True))
        near = min(p + i for p, i in zip(self.shift, self.query, strict=True))
        return far >= self.window or (not self.causal and self.groups.width - 1 - near >= self.window)

    def prefix_mask(self) -> Tensor:
        """`[B, 1, N, P]`, true where a prefix key is seen."""
        groups, device = self.groups, self.q.device
        lens = [0] * len(groups.order)
        for rows, _, length in groups:
            for row in rows:
                lens[row] = length
        table = torch.tensor([lens, self.shift, self.query], device=device)[:, :, None, None, None]
        ends, shift, query = table.unbind()
        p = torch.arange(groups.width, device=device)
        mask = (p < ends).expand(-1, -1, self.q.shape[2], -1)
        if self.window is not None:
            distance = shift + query + torch.arange(self.q.shape[2], device=device)[:, None] - p
            mask = mask & ((distance if self.causal else distance.abs()) < self.window)
        return mask

    @cached_property
    def all_see(self) -> bool:
        """Whether every query certainly sees a key, so that its softmax is defined."""
        if self.groups.lens and min(self.groups.lens) > 0 and not self.window_cuts_prefix:
            return True
        last = self.q.shape[2] - 1
        bounds = zip(self.start, self.end, self.query, strict=True)
        if self.causal or self.window is not None:
            return all(s <= i and i + last < e for s, e, i in bounds)
        return all(s < e for s, e, _ in bounds)

    def without_padding(self) -> Problem:
        """The same problem with zeros where `k` and `v` hold padding, whatever it held."""
        if not self.padded:
            return self
        bounds = torch.tensor([self.start, self.end], device=self.k.device)[:, :, None]
        j = torch.arange(self.k.shape[2], device=self.k.device)
        hidden = ((j < bounds[0]) | (j >= bounds[1]))[:, None, :, None]
        return replace(self, k=self.k.masked_fill(hidden, 0.0), v=self.v.masked_fill(hidden, 0.0))

    def _hides_own(self, queries: int, size: int) -> bool:
        """Whether causality or the window hides a key from a query."""
        early, late = min(self.query), max(self.query) + queries - 1
        if self.causal and early < size - 1:
            return True
        return self.window is not None and (
            late >= self.window or (not self.causal and size - 1 - early >= self.window)
        )


def build(call: PrefixAttention, plan: Tensor | None) -> Problem:
    """Brings index arguments to the host and cuts the own keys to those some row has."""
    rows, _, queries, _ = call.q.shape
    k, v, bias, size = call.k, call.v, call.bias, call.k.shape[2]
    lens = call.prefix_len.tolist()
    groups = Groups.build(plan, call.prefix_start.tolist(), lens, call.prefix_k.shape[1])
    if call.prefix_bias is not None and call.prefix_bias.shape[3] < groups.width:
        raise ArgumentError(
            f"prefix_bias has {call.prefix_bias.shape[3]} columns, the longest prefix has {groups.width} tokens; "
            "give a column for each"
        )
    offset = [0] * rows if call.kv_start is None else call.kv_start.tolist()
    end = [size] * rows if call.kv_len is None else [min(n, size) for n in call.kv_len.tolist()]
    query = [size - queries] * rows if call.q_start is None else call.q_start.tolist()
    start = [max(s, 0) for s in offset]
    first, last = min(start, default=0), max(end, default=0)
    if last <= first:
        first = last = 0
    if last - first < size:
        k, v = k[:, :, first:last], v[:, :, first:last]
        bias = None if bias is None else bias[..., first:last]
    return Problem(
        call.q, k, v, call.prefix_k, call.prefix_v, groups, call.sinks, bias, call.prefix_bias, first,
        [s - first for s in start], [e - first for e in end], [i - first for i in query],
        [n + first - s for n, s in zip(lens, offset, strict=True)],
        call.causal, call.scale, call.window, call.softcap,
    )  # fmt: skip
