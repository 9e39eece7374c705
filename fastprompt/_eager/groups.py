"""Rows of a batch by prompt, and the three matrix products of grouped reading.

Tensors over rows are `x [B, Hkv, M, d]`, M being whatever is folded into query rows; an arena is `[Hkv, T, d]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastprompt._eager import staging
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan, unpack

_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # plan -> (extents, their groups)


@dataclass(frozen=True)
class Groups:
    """The rows `order[sum(counts[:g]) :][: counts[g]]` read the extent `starts[g], lens[g]`."""

    order: list[int]
    counts: list[int]
    starts: list[int]
    lens: list[int]

    @classmethod
    def build(cls, plan: Tensor | None, starts: list[int], lens: list[int], tokens: int) -> Groups:
        """Groups of a packed plan (made here when None) with the extents of this call's arena of `tokens` tokens.

        The layers of a step share a plan: its groups are kept as long as it lives.
        """
        extents = (starts, lens, tokens)
        if plan is None:
            return cls._build(
                BatchPlan.build([s if n else 0 for s, n in zip(starts, lens, strict=True)], lens).packed, *extents
            )
        known = _KNOWN.get(plan)
        if known is None or known[0] != extents:
            known = _KNOWN[plan] = (extents, cls._build(plan, *extents))
        return known[1]

    @classmethod
    def _build(cls, plan: Tensor, starts: list[int], lens: list[int], tokens: int) -> Groups:
        starts = [s if n else 0 for s, n in zip(starts, lens, strict=True)]
        order, offsets = unpack(plan)
        if len(order) != len(starts):
            raise ArgumentError(f"plan holds {len(order)} rows, the batch has {len(starts)}; build a plan for it")
        heads = [order[at] for at in offsets[:-1]]
        counts = [b - a for a, b in pairwise(offsets)]
        groups = cls(order, counts, [starts[row] for row in heads], [lens[row] for row in heads])
        check_extents(heads, groups.starts, groups.lens, tokens, "prefix_start and prefix_len")
        groups._verify(starts, lens)
        return groups._in_row_order() if groups.single and min(lens, default=0) > 0 else groups

    def _verify(self, starts: list[int], lens: list[int]) -> None:
        """Every row of a group has the group's extent."""
        for rows, s, n in self:
            for row in rows:
                if lens[row] != n or starts[row] != s:
                    raise ArgumentError(
                        f"plan puts row {row} with row {rows[0]}, but prefix_start and prefix_len give them different "
                        "prompts; build the plan from this batch"
                    )

    def _in_row_order(self) -> Groups:
        """Groups of one row each need no sorting: the same in the order of the rows."""
        at = sorted(range(len(self.order)), key=self.order.__getitem__)
        return Groups(
            [self.order[i] for i in at], self.counts, [self.starts[i] for i in at], [self.lens[i] for i in at]
        )

    def __iter__(self) -> Iterator[tuple[list[int], int, int]]:
        """Each group's rows, start and length."""
        at = 0
        for count, start, length in zip(self.counts, self.starts, self.lens, strict=True):
            yield self.order[at : at + count], start, length
            at += count

    @cached_property
    def width(self) -> int:
        """The longest extent."""
        return max(self.lens, default=0)

    @cached_property
    def ragged(self) -> bool:
        """Whether extents differ in length."""
        return min(self.lens, default=0) != self.width

    @cached_property
    def prompted(self) -> int:
        """Groups with a prompt, where they stand in front of the rows without one."""
        count = sum(n > 0 for n in self.lens)
        return count if not any(self.lens[count:]) else 0

    @cached_property
    def alike(self) -> bool:
        """Whether the groups with a prompt are so even in rows and length that several share one product."""
        counts, lens = self.counts[: self.prompted], self.lens[: self.prompted]
        return len(lens) > 1 and min(counts) == max(counts) and 2 * sum(lens) >= len(lens) * self.width

    @cached_property
    def tokens(self) -> Tensor:
        """`[prompted, P]`: arena tokens of each prompt, its last one repeated up to the longest."""
        starts, lens = (torch.tensor(v[: self.prompted])[:, None] for v in (self.starts, self.lens))
        return starts + torch.minimum(torch.arange(self.width), lens - 1)

    @cached_property
    def single(self) -> bool:
        """Whether every group is one row."""
        return len(self.counts) == len(self.order)

    @cached_property
    def in_order(self) -> bool:
        """Whether group order is row order."""
        return self.order == list(range(len(self.order)))

    @cached_property
    def _sorting(self) -> tuple[Tensor, Tensor]:
        """Row numbers in group order, and places in group order by row number."""
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return torch.tensor(self.order), torch.tensor(places)

    def sort(self, x: Tensor) -> Tensor:
        """Rows of `x` in group order."""
        return x if self.in_order else x.index_select(0, self._sorting[0].to(x.device))

    def unsort(self, x: Tensor) -> Tensor:
        """Inverse of `sort`."""
        return x if self.in_order else x.index_select(0, self._sorting[1].to(x.device))

    def chunks(self, x: Tensor) -> list[Tensor]:
        """Per group the folded rows `[Hkv, R*M, d]` of `x`."""
        if self.single:
            return list(self.sort(x).unbind())
        return list(fold(self.sort(x)).split_with_sizes(self._sizes(x), 1))

    def join(self, chunks: list[Tensor | None], like: Tensor, width: int, fill: float) -> Tensor:
        """`[B, Hkv, M, width]` from each group's `[Hkv, R*M, <= width]`; `fill` where a group has nothing."""
        present = [c for c in chunks if c is not None and c.shape[2] == width]
        if chunks and len(present) == len(chunks):
            joined = torch.stack(present) if self.single else unfold(torch.cat(present, 1), like.shape[0])
            return self.unsort(joined)
        rows, heads, m = like.shape[:3]
        out = like.new_full((heads, rows * m, width), fill)
        for part, chunk in zip(out.split_with_sizes(self._sizes(like), 1), chunks, strict=True):
            if chunk is not None:
                part.narrow(2, 0, chunk.shape[2]).copy_(chunk)
        return self.unsort(unfold(out, rows))

    def _sizes(self, x: Tensor) -> list[int]:
        return [count * x.shape[2] for count in self.counts]


def check_extents(rows: list[int], starts: list[int], lens: list[int], size: int, names: str) -> None:
    """Each extent lies inside `0 .. size - 1`; an empty one lies anywhere. `names` are the arguments they came in."""
    for row, s, n in zip(rows, starts, lens, strict=True):
        if n < 0 or (n and (s < 0 or s + n > size)):
            raise ArgumentError(
                f"row {row} has start {s} and length {n}, expected an extent inside 0..{size}; check {names}"
            )


def fold(x: Tensor) -> Tensor:
    """`[R, H, M, d]` as `[H, R*M, d]`."""
    return x.transpose(0, 1).flatten(1, 2)


def unfold(x: Tensor, rows: int) -> Tensor:
    """`[H, R*M, d]` as `[R, H, M, d]`."""
    return x.unflatten(1, (rows, -1)).transpose(0, 1)


def scores(x: Tensor, arena: Tensor, groups: Groups, fill: float) -> Tensor:
    """Products of each row with its extent: `x [B, Hkv, M, d]` -> `[B, Hkv, M, P]`, `fill` beyond the extent."""
    if groups.alike:
        return staging.scores(x, arena, groups, fill)
    keys = _views(arena.mT, 2, groups, x.dtype)
    products = [None if k is None else torch.bmm(c, k) for c, k in zip(groups.chunks(x), keys, strict=True)]
    return groups.join(products, x, groups.width, fill)


def mix(weights: Tensor, arena: Tensor, groups: Groups) -> Tensor:
    """Weighted sums over each row's extent: `weights [B, Hkv, M, P]` -> `[B, Hkv, M, d]`."""
    if groups.alike:
        return staging.mix(weights, arena, groups)
    chunks = groups.chunks(weights)
    if groups.ragged:
        chunks = [c.narrow(2, 0, n) for c, n in zip(chunks, groups.lens, strict=True)]
    values = _views(arena, 1, groups, weights.dtype)
    products = [None if v is None else torch.bmm(c, v) for c, v in zip(chunks, values, strict=True)]
    return groups.join(products, weights, arena.shape[2], 0.0)


def outer(weights: Tensor, x: Tensor, tokens: int, groups: Groups) -> Tensor:
    """Sums over the rows that read a token: `weights [B, Hkv, M, P]`, `x [B, Hkv, M, d]` -> `[Hkv, T, d]`."""
    total = x.new_zeros(x.shape[1], tokens, x.shape[3])
    pairs = zip(groups.chunks(weights), groups.chunks(x), groups.starts, groups.lens, strict=True)
    for w, c, s, n in pairs:
        if n:
            total[:, s : s + n] += torch.bmm(w[..., :n].mT, c)
    return total


def _views(arena: Tensor, dim: int, groups: Groups, dtype: torch.dtype) -> Iterator[Tensor | None]:
    """Each group's extent in an arena whose tokens are `dim`, widened one at a time where `dtype` asks for it."""
    for s, n in zip(groups.starts, groups.lens, strict=True):
        view = arena.narrow(dim, s, n) if n else None
        yield view if view is None or view.dtype == dtype else view.to(dtype)
