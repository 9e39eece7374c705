"""Own keys and values of a case as pages of a cache, in any order, for whatever reads them so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.attention_cases import Case
from bench.attention_inputs import Inputs

SIZE = 16  # tokens of a page


@dataclass(frozen=True)
class Pages:
    """`k`, `v` `[pages, SIZE, Hkv, D]` and int32 `table [B, pages of a row]`; `k` and `v` hold NaN in unused slots."""

    k: Tensor
    v: Tensor
    table: Tensor


def paged(x: Inputs, spare: int = 0, seed: int = 0) -> Pages:
    """The own keys of every row, all of a length, spread over pages in random order behind `spare` free ones."""
    rows, _, keys, _ = x.k.shape
    each = -(-keys // SIZE)
    order = torch.randperm(rows * each, generator=torch.Generator().manual_seed(seed)).to(x.k.device) + spare
    caches = [_spread(own, order, each, spare) for own in (x.k, x.v)]
    return Pages(*caches, order.view(rows, each).int())


def packed(x: Tensor) -> Tensor:
    """`[B, H, N, D]` as contiguous rows `[B * N, H, D]`."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]).contiguous()


def offsets(rows: int, each: int, device: torch.device | str) -> Tensor:
    """int32 `[rows + 1]`: where each of so many rows of equal length begins."""
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * each


def whole_pages(case: Case) -> bool:
    """Whether every prompt fills its pages, so that a row's pages can follow those of its prompt."""
    return not case.ragged and not case.padded and case.prefix % SIZE == 0


def _spread(own: Tensor, order: Tensor, each: int, spare: int) -> Tensor:
    rows, heads, keys, dim = own.shape
    cache = own.new_full((spare + rows * each, SIZE, heads, dim), torch.nan)
    by_token = own.new_full((rows, each * SIZE, heads, dim), torch.nan)
    by_token[:, :keys] = own.transpose(1, 2)
    return cache.index_copy_(0, order, by_token.view(rows * each, SIZE, heads, dim))
