"""Runs a step's pieces through the backbone: packed into one row, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt.batch import Extent, PrefixBatch
from fastprompt.context import Call, activate
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.integrations.transformers.paged import PagedCache, PagedMask, PagedRows

Arenas = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Slice:
    """`tokens` of one row to run: they get the own indices from `first` on, behind the prompt at `extent`.

    `blocks` hold the row's keys and values, those of the new tokens included. With `wanted` the logits behind the last
    token are returned. `text` is the whole row, for a runner that keeps no cache.
    """

    tokens: Sequence[int]
    first: int
    blocks: Sequence[int]
    extent: Extent | None
    wanted: bool
    text: Sequence[int]

    @property
    def positions(self) -> range:
        """Of the new tokens: the text begins behind the prompt."""
        start = self.first + (self.extent.shift if self.extent is not None else 0)
        return range(start, start + len(self.tokens))


def cuts_logits(backbone: Backbone) -> bool:
    """Whether the backbone can leave its output layer out where nobody wants logits."""
    return "logits_to_keep" in inspect.signature(backbone.model.forward).parameters


class Runner(Protocol):
    """What the engine needs of a way to run a step."""

    def run(self, slices: Sequence[Slice], arenas: Arenas) -> Tensor:
        """Logits `[R, V]` of the wanted slices, in their order."""


@dataclass(frozen=True)
class PackedStep:
    """Tensors of one forward: `ids`, `positions` `[1, tokens]`, places of the logits wanted, what attention reads."""

    ids: Tensor
    positions: Tensor
    keep: Tensor
    mask: PagedMask


class PackedRunner:
    """All tokens of a step in one row of `input_ids [1, tokens]`, their keys and values in a paged cache.

    `blocks` of `block_size` tokens are allocated at once, in the backbone's dtype, on each layer's device.
    """

    def __init__(self, backbone: Backbone, blocks: int, block_size: int) -> None:
        self.backbone, self.block_size = backbone, block_size
        shapes, devices, dtype = backbone.spec.layers, backbone.layer_devices, backbone.dtype
        keys, values = (
            [
                torch.zeros(blocks, block_size, s.kv_heads, d, dtype=dtype, device=device)
                for s, d, device in zip(shapes, dims, devices, strict=True)
            ]
            for dims in ([s.key_dim for s in shapes], [s.value_dim for s in shapes])
        )
        self.cache = PagedCache(keys, values)
        self._cuts = cuts_logits(backbone)
        self._shares = dispatch.reads_together(backbone.device, dtype)
        self._last: tuple[Any, PrefixBatch] | None = None

    @staticmethod
    def block_bytes(backbone: Backbone, block_size: int) -> int:
        """Bytes of one block in all layers."""
        return block_size * sum(shape.width for shape in backbone.spec.layers) * backbone.dtype.itemsize

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice], arenas: Arenas) -> Tensor:
        """Logits `[R, V]` of the wanted slices, in their order."""
        counts = [len(s.tokens) for s in slices]
        ends = list(accumulate(counts, initial=0))
        wanted = [end - 1 for s, end in zip(slices, ends[1:], strict=True) if s.wanted]
        device = self.backbone.device
        return self.forward(
            PackedStep(
                ids=torch.tensor([[t for s in slices for t in s.tokens]], device=device),
                positions=torch.tensor([[p for s in slices for p in s.positions]], device=device),
                keep=torch.tensor(wanted, dtype=torch.long, device=device),
                mask=PagedMask(self._rows(slices, ends), self.cache, self._prefixes(slices, arenas)),
            )
        )

    def forward(self, step: PackedStep) -> Tensor:
        """Logits `[R, V]` of the tokens at `step.keep`."""
        inputs: dict[str, Any] = {"input_ids": step.ids, "attention_mask": torch.ones_like(step.ids)}
        if self.backbone.takes_position_ids:
            inputs["position_ids"] = step.positions
        if self._cuts:
            inputs["logits_to_keep"] = step.keep
        with activate(Call(self.backbone.owner, paged=step.mask)):
            logits: Tensor = self.backbone.model(**inputs, use_cache=False, return_dict=True).logits[0]
        return logits if self._cuts else logits[step.keep]

    def _rows(self, slices: Sequence[Slice], ends: list[int]) -> PagedRows:
        size, device = self.block_size, self.backbone.device
        widest = max(len(s.blocks) for s in slices)
        tables = [[*s.blocks, *[0] * (widest - len(s.blocks))] for s in slices]
        slots = [s.blocks[i // size] * size + i % size for s in slices for i in range(s.first, s.first + len(s.tokens))]
        lengths = [s.first + len(s.tokens) for s in slices]
        return PagedRows(
            slots=torch.tensor(slots, device=device),
            block_table=torch.tensor(tables, dtype=torch.int32, device=device),
            q_start=torch.tensor(ends, dtype=torch.int32, device=device),
            kv_len=torch.tensor(lengths, dtype=torch.int32, device=device),
        )

    def _prefixes(self, slices: Sequence[Slice], arenas: Arenas) -> PrefixBatch:
        """The rows' prefixes; kept from the last step while the same rows decode."""
        keys, values = arenas
        layers = self.backbone.spec.num_layers
        extents = tuple(s.extent for s in slices)
        queries = [len(s.tokens) for s in slices] if self._shares else None
        decoding = queries and [n == 1 for n in queries]  # all that a plan makes of them
        known = (extents, decoding, keys[0].data_ptr(), keys[0].shape)
        if self._last is None or self._last[0] != known:
            self._last = (known, PrefixBatch.build(keys[:layers], values[:layers], extents, queries))
        return self._last[1]
