"""Which prefix each row of a batch reads, layer by layer: built once a step, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from fastprompt.plan import BatchPlan
from fastprompt.spec import Prefix


@dataclass(frozen=True)
class Extent:
    """A row's place in an arena: `length` tokens from `start`, present in `layers` only.

    `shift` is the number of positions by which it moves the row's text.
    """

    start: int
    length: int
    layers: tuple[int, ...]
    shift: int


@dataclass(frozen=True)
class LayerRows:
    """`prefix_start` and `prefix_len` (int32 `[B]`) of the rows in one layer, and their plan; `reads`: any has one."""

    start: torch.Tensor
    length: torch.Tensor
    plan: BatchPlan
    reads: bool

    @staticmethod
    def build(
        starts: Sequence[int],
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        queries: Sequence[int] | None = None,
    ) -> LayerRows:
        """`queries`: of each row, for a plan that says which rows read their prompt together."""
        as_tensor = torch.tensor([list(starts), list(lengths)], dtype=torch.int32, device=device)
        plan = BatchPlan.build(starts, lengths, queries=queries, device=device)
        return LayerRows(as_tensor[0], as_tensor[1], plan, any(lengths))

    @staticmethod
    def none(rows: int, device: torch.device | str = "cpu") -> LayerRows:
        """Rows without a prefix."""
        return LayerRows.build([0] * rows, [0] * rows, device)

    def to(self, device: torch.device) -> LayerRows:
        if self.start.device == device:
            return self
        return replace(self, start=self.start.to(device), length=self.length.to(device))


@dataclass(frozen=True)
class PrefixBatch:
    """Arenas and rows of one batch.

    `keys[l]` `[Hkv, T, D]`, `values[l]` `[Hkv, T, Dv]` and `layer_rows[l]` belong to prefix layer l, where the arena
    may be missing if no row reads it; `lengths[b]` is the number of positions row b's text is moved by.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    layer_rows: tuple[LayerRows, ...]
    extents: tuple[Extent | None, ...]
    lengths: tuple[int, ...]
    _shifts: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)
    _casts: dict[torch.dtype, PrefixBatch] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def read_in(self, layer: int) -> tuple[LayerRows, torch.Tensor, torch.Tensor] | None:
        """The rows of a layer and its arenas of keys and values; None where no row has a prefix."""
        rows = self.layer_rows[layer]
        return (rows, self.keys[layer], self.values[layer]) if rows.reads else None

    def shift(self, device: torch.device) -> torch.Tensor:
        """`lengths` as int64 `[B]` on a device."""
        if device not in self._shifts:
            self._shifts[device] = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return self._shifts[device]

    def to_dtype(self, dtype: torch.dtype) -> PrefixBatch:
        """The batch in the dtype of the queries (autocast): a copy of the extents that rows read, each once."""
        if all(t.dtype == dtype for t in (*self.keys, *self.values)):
            return self
        if dtype not in self._casts:
            unique = list(dict.fromkeys(e for e in self.extents if e is not None))
            ends = list(accumulate((e.length for e in unique), initial=0))
            moved = {e: replace(e, start=start) for e, start in zip(unique, ends, strict=False)}

            def cut(arena: torch.Tensor) -> torch.Tensor:
                return torch.cat([arena[:, e.start : e.start + e.length] for e in unique], dim=1).to(dtype)

            extents = [moved[e] if e is not None else None for e in self.extents]
            self._casts[dtype] = PrefixBatch.build([*map(cut, self.keys)], [*map(cut, self.values)], extents)
        return self._casts[dtype]

    def repeat_to(self, rows: int) -> PrefixBatch:
        """Each row repeated in place so that there are `rows` of them."""
        times, rest = divmod(rows, max(self.rows, 1))
        if rest or not times:
            raise ValueError(f"a batch of {self.rows} rows cannot serve {rows}")
        extents = [e for e in self.extents for _ in range(times)]
        return PrefixBatch.build(self.keys, self.values, extents)

    @staticmethod
    def build(
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        extents: Sequence[Extent | None],
        queries: Sequence[int] | None = None,
    ) -> PrefixBatch:
        """Rows reading `extents` of arenas that all layers lay out alike; None is a row without a prompt.

        `queries`: as in `BatchPlan.build`, where kernels look at what it makes of them.
        """
        built: dict[tuple[torch.device, tuple[bool, ...]], LayerRows] = {}
        layer_rows = []
        for layer, key in enumerate(keys):
            present = tuple(e is not None and layer in e.layers for e in extents)
            if (key.device, present) not in built:
                pairs = [
                    (e.start, e.length) if e and here else (0, 0) for e, here in zip(extents, present, strict=True)
                ]
                starts, lens = [s for s, _ in pairs], [n for _, n in pairs]
                built[key.device, present] = LayerRows.build(starts, lens, key.device, queries)
            layer_rows.append(built[key.device, present])
        lengths = tuple(e.shift if e else 0 for e in extents)
        return PrefixBatch(tuple(keys), tuple(values), tuple(layer_rows), tuple(extents), lengths)


def assemble(
    prefixes: Sequence[Prefix],
    rows: Sequence[int | None],
    empty: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shifts: Sequence[int],
) -> PrefixBatch:
    """A differentiable batch: `prefixes` laid end to end as an arena, row b reading `prefixes[rows[b]]`.

    Each prompt is written once however many rows read it. `empty[l]` is layer l's `[Hkv, 0, D]`, `[Hkv, 0, Dv]` pair,
    which gives shape, dtype and device; a prompt absent from a layer leaves zeros there that nothing reads. `shifts[i]`
    is how far `prefixes[i]` moves a row's text.
    """
    starts = [0]
    for prefix in prefixes:
        starts.append(starts[-1] + prefix.length)
    where = [{layer: i for i, layer in enumerate(p.layers)} for p in prefixes]
    keys, values = [], []
    for layer, (key, value) in enumerate(empty):
        parts = [
            (p.keys[w[layer]], p.values[w[layer]]) if layer in w else None for p, w in zip(prefixes, where, strict=True)
        ]
        keys.append(_lay_out(key, [part and part[0] for part in parts], prefixes))
        values.append(_lay_out(value, [part and part[1] for part in parts], prefixes))
    made = [Extent(at, p.length, p.layers, shift) for at, p, shift in zip(starts, prefixes, shifts, strict=False)]
    return PrefixBatch.build(keys, values, [made[i] if i is not None else None for i in rows])


def _lay_out(like: torch.Tensor, parts: Sequence[torch.Tensor | None], prefixes: Sequence[Prefix]) -> torch.Tensor:
    if all(part is None for part in parts):
        return like
    heads, _, dim = like.shape
    blocks = [
        part.to(like) if part is not None else like.new_zeros(heads, prefix.length, dim)
        for part, prefix in zip(parts, prefixes, strict=True)
    ]
    return torch.cat([like, *blocks], dim=1)
