"""FlashInfer and flash-attn by stand-ins, which do on the CPU what their documentation says."""

from __future__ import annotations

import math
import types

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """`[N, Hq, D]` over `[S, Hkv, D]`, causal to the lower right."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    logits = q.transpose(0, 1) @ k.mT / math.sqrt(q.shape[2])
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[0])
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1)


def in_parts(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, causal: bool) -> Tensor:
    spans = zip(q_at[:-1], q_at[1:], k_at[:-1], k_at[1:], strict=True)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal) for a, b, c, d in spans])


class Level:
    """A level of pages as FlashInfer documents it."""

    def __init__(self, q_at: Tensor, page_at: Tensor, pages: Tensor, last: Tensor, size: int) -> None:
        assert all(x.dtype == torch.int32 for x in (q_at, page_at, pages, last))
        self.q_at, self.page_at, self.pages, self.last, self.size = q_at, page_at, pages, last, size

    def states(self, q: Tensor, caches: tuple[Tensor, Tensor], causal: bool) -> tuple[Tensor, Tensor]:
        """Logits' exponentials summed, with and without values: what merging needs."""
        weighted, total = [], []
        for g in range(len(self.q_at) - 1):
            mine = self.pages[self.page_at[g] : self.page_at[g + 1]].long()
            tokens = (len(mine) - 1) * self.size + int(self.last[g])
            k, v = (c[mine].flatten(0, 1)[:tokens] for c in caches)
            queries = q[self.q_at[g] : self.q_at[g + 1]]
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            logits = queries.transpose(0, 1) @ k.mT / math.sqrt(q.shape[2])
            if causal:
                seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(tokens - len(queries))
                logits = logits.masked_fill(~seen, -torch.inf)
            weights = logits.exp()
            weighted.append((weights @ v).transpose(0, 1))
            total.append(weights.sum(-1).T)
        return torch.cat(weighted), torch.cat(total)


class Cascade:
    def __init__(self, levels: int, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.count = levels

    def plan(self, q_at, page_at, pages, last, heads, kv_heads, dim, size, causal=False, **dtypes) -> None:
        levels = zip(q_at, page_at, pages, last, strict=True)
        self.levels = [Level(*given, size) for given in levels]
        self.causal = causal
        assert len(self.levels) == self.count and dtypes.keys() == {"q_data_type", "kv_data_type"}

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        states = [level.states(q, caches, self.causal and i == self.count - 1) for i, level in enumerate(self.levels)]
        return sum(s[0] for s in states) / sum(s[1] for s in states)[..., None]


class ByRow:
    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD"

    def plan(self, indptr, indices, last, heads, kv_heads, dim, size, **dtypes) -> None:
        q_at = torch.arange(len(indptr), dtype=torch.int32)
        self.level = Level(q_at, indptr, indices, last, size)

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        weighted, total = self.level.states(q, caches, False)
        return weighted / total[..., None]


FLASHINFER = types.SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade, BatchDecodeWithPagedKVCacheWrapper=ByRow)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.stack([attend(*row, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, causal: bool) -> Tensor:
    assert cache_seqlens.dtype == torch.int32 and set(cache_seqlens.tolist()) == {k.shape[1]}
    return flash_attn_func(q, k, v, causal)


FLASH = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
