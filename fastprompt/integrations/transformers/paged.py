"""Attention of packed rows over paged caches of their own tokens, under transformers' attention interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastprompt import ops
from fastprompt.batch import PrefixBatch


@dataclass(frozen=True)
class PagedRows:
    """Where the packed tokens of a step belong.

    `slots` `[tokens]` are the places in the caches that the step's new tokens get; `block_table` `[B, max_blocks]`,
    `q_start` `[B + 1]` and `kv_len` `[B]` as in `ops.paged_prefix_attention`.
    """

    slots: Tensor
    block_table: Tensor
    q_start: Tensor
    kv_len: Tensor


class PagedCache:
    """Keys `[blocks, block_size, Hkv, D]` and values `[blocks, block_size, Hkv, Dv]` of every attention layer."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put the new tokens' `key` `[1, Hkv, tokens, D]` and `value` where `slots` says."""
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            cache.flatten(0, 1).index_copy_(0, slots, new[0].transpose(0, 1).to(cache.dtype))


@dataclass(frozen=True, eq=False)
class PagedMask:
    """A packed step; travels in place of the attention mask."""

    rows: PagedRows
    cache: PagedCache
    prefixes: PrefixBatch
    window: int | None = None
    ndim = 4  # transformers passes a prepared mask of rank 4 through

    def within(self, window: int | None) -> PagedMask:
        """The same step for layers with a local window."""
        return replace(self, window=window)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Cache the new tokens of a layer, then attend: `[1, Hq, tokens, D]` queries to `[1, tokens, Hq, Dv]`."""
        rows, cache, prefixes = self.rows, self.cache, self.prefixes
        cache.write(layer, rows.slots, key, value)
        reads = prefixes.layer_rows[layer]
        out = ops.paged_prefix_attention(
            query[0].transpose(0, 1),
            cache.keys[layer],
            cache.values[layer],
            rows.block_table,
            rows.q_start,
            rows.kv_len,
            prefixes.keys[layer],
            prefixes.values[layer],
            reads.start,
            reads.length,
            scale=scale,
            window=self.window,
            softcap=softcap,
            sinks=sinks,
            plan=reads.plan,
        )
        assert isinstance(out, torch.Tensor)
        return out[None]
