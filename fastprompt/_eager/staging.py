"""Products of many prompts at once, for groups that are alike: lonely rows of decoding above all.

A product for each prompt waits for memory many times. Here a few prompts' tokens at a time are streamed side by side
into a buffer of bounded size, and one batched product serves them. Tensors are as in `groups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastprompt._eager.groups import Groups

_NUMBERS = 2**18  # in a buffer: 1 MiB of float32, a core's second-level cache


def scores(x: Tensor, arena: Tensor, groups: Groups, fill: float) -> Tensor:
    """Products of each row with its extent: `x [B, Hkv, M, d]` -> `[B, Hkv, M, P]`, `fill` beyond the extent."""
    split = _by_group(x, groups)
    out = _joined([torch.matmul(split[:, at], block.to(x.dtype).mT) for at, (block,) in stages(groups, arena)])
    if groups.ragged:
        ends = torch.tensor(groups.lens[: groups.prompted], device=x.device)[:, None, None]
        out.masked_fill_(torch.arange(groups.width, device=x.device) >= ends, fill)
    return _by_row(out, x, groups, fill)


def mix(weights: Tensor, arena: Tensor, groups: Groups) -> Tensor:
    """Weighted sums over each row's extent: `weights [B, Hkv, M, P]` -> `[B, Hkv, M, d]`."""
    split = _by_group(weights, groups)
    out = _joined([torch.matmul(split[:, at], block.to(weights.dtype)) for at, (block,) in stages(groups, arena)])
    return _by_row(out, weights, groups, 0.0)


def stages(groups: Groups, *arenas: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some groups at a time with their tokens `[Hkv, groups, P, d]` of each arena, an extent's last one repeated."""
    tokens = groups.tokens.to(arenas[0].device)
    step = max(1, _NUMBERS // (arenas[0].shape[0] * groups.width * arenas[0].shape[2]))
    for at in range(0, groups.prompted, step):
        index = tokens[at : at + step]
        blocks = [arena.index_select(1, index.flatten()).unflatten(1, index.shape) for arena in arenas]
        yield slice(at, at + len(index)), blocks


def _by_group(x: Tensor, groups: Groups) -> Tensor:
    """`[Hkv, groups, R*M, d]`: the rows with a prompt, a group's R rows folded."""
    inside = sum(groups.counts[: groups.prompted])
    sorted_rows = groups.sort(x)[:inside]
    return sorted_rows.transpose(0, 1).reshape(x.shape[1], groups.prompted, -1, x.shape[3])


def _by_row(out: Tensor, like: Tensor, groups: Groups, fill: float) -> Tensor:
    """Inverse of `_by_group`, with `fill` for the rows without a prompt."""
    rows, heads, m, _ = like.shape
    inside = sum(groups.counts[: groups.prompted])
    out = out.view(heads, inside, m, -1).transpose(0, 1)
    if inside < rows:
        out = torch.cat([out, out.new_full((rows - inside, *out.shape[1:]), fill)])
    return groups.unsort(out)


def _joined(products: list[Tensor]) -> Tensor:
    return torch.cat(products, dim=1) if len(products) > 1 else products[0]
