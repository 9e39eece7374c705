"""Prefix attention from torch's fused CPU attention: one call for the own keys, one for each prompt, merged by lse.

The fused kernel takes heads grouped by kv head and any strides, so prefixes are read where they lie. Its backward,
given the joint output and lse, returns the gradients of the keys it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fastprompt._eager import groups, staging
from fastprompt._eager.problem import INF, Problem

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def serves(pb: Problem) -> bool:
    """Whether the fused kernel computes this problem exactly."""
    plain = pb.softcap is None and pb.bias is None and pb.prefix_bias is None and not pb.window_cuts_prefix
    same = pb.q.dtype == pb.k.dtype == pb.v.dtype == pb.prefix_k.dtype == pb.prefix_v.dtype
    dense = all(t.stride(-1) == 1 for t in (pb.q, pb.k, pb.v, pb.prefix_k, pb.prefix_v))
    return plain and same and dense and pb.q.is_cpu and pb.q.shape[3] == pb.v.shape[3]


def forward(pb: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Hq, N, D]` and `lse [B, Hq, N]`, both in float32 at least."""
    out, lse = _own(pb.without_padding())
    out = out.to(lse.dtype)
    for rows, part, part_lse in _prefixes(pb):
        _merge_rows(out, lse, rows, part, part_lse)
    if pb.sinks is not None:
        sinks = pb.sinks.to(lse.dtype)[:, None]
        out *= torch.sigmoid(lse - sinks)[..., None]
        lse = torch.logaddexp(lse, sinks)
    return out, lse


def backward(pb: Problem, dout: Tensor, out: Tensor, lse: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Gradients of q, k, v, prefix_k, prefix_v, sinks and two Nones; `dout`, `out` are `[B, Hq, N, D]`."""
    finite = lse.masked_fill(lse == -INF, 0.0)  # the kernel computes exp(logit - lse)
    grads: list[Tensor | None] = [None] * 8
    dq = torch.zeros_like(pb.q, dtype=lse.dtype) if wanted[0] else None
    if any(wanted[:3]) and pb.k.shape[2]:
        own = pb.without_padding()
        own_dq, grads[1], grads[2] = _attend_backward(
            dout, own.q, own.k, own.v, out, finite, 0.0, pb.causal_square, attn_mask=_additive(pb), scale=pb.scale
        )
        dq = own_dq.to(lse.dtype) if wanted[0] else None
    if wanted[0] or wanted[3] or wanted[4]:
        dq, grads[3], grads[4] = _prefix_backward(pb, dout, out, finite, dq)
    grads[0] = dq
    if wanted[5] and pb.sinks is not None:
        delta = (dout.to(lse.dtype) * out).sum(-1)
        grads[5] = -((pb.sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum((0, 2))
    return grads


def _own(pb: Problem) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = pb.q.shape
    if pb.k.shape[2] == 0:
        lse = torch.full((batch, heads, queries), -INF, dtype=_lse_dtype(pb.q), device=pb.q.device)
        return torch.zeros_like(pb.q), lse
    q = pb.q
    if queries == 1:  # the heads of one kv head become query rows: each key is read once
        q = q.reshape(batch, pb.k.shape[1], -1, dim)
    out, lse = _attend(q, pb.k, pb.v, 0.0, pb.causal_square, attn_mask=_additive(pb), scale=pb.scale)
    if queries == 1:
        out, lse = out.reshape(batch, heads, 1, dim), lse.reshape(batch, heads, 1)
    if pb.own_mask is not None and not pb.causal_square:
        lse = lse.masked_fill(~pb.own_mask.any(-1), -INF)
    return out, lse


def _additive(pb: Problem) -> Tensor | None:
    """The own mask as the kernel takes it."""
    if pb.causal_square or pb.own_mask is None:
        return None
    return torch.zeros(pb.own_mask.shape, dtype=pb.q.dtype).masked_fill_(~pb.own_mask, -INF)


def _prefixes(pb: Problem) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows with their attention to their prompts: `out [R, Hq, N, D]`, `lse [R, Hq, N]`."""
    each = pb.groups.counts[0] if pb.groups.alike else 0
    if each == 1 or (each and pb.q.shape[2] == 1):
        for at, (k, v) in staging.stages(pb.groups, pb.prefix_k, pb.prefix_v):
            rows = pb.groups.order[at.start * each : at.stop * each]
            yield rows, *_attend_prompts(pb, rows, k.transpose(0, 1), v.transpose(0, 1), _within(pb, at))
    else:
        for rows, start, length in pb.groups:
            if length:
                k, v = (a.narrow(1, start, length)[None] for a in (pb.prefix_k, pb.prefix_v))
                yield rows, *_attend_prompts(pb, rows, k, v, None)


def _attend_prompts(pb: Problem, rows: list[int], k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows, as many for each prompt, over prompts `k`, `v` `[groups, Hkv, P, D]`."""
    q = _take(pb.q, rows)
    count, heads, queries, dim = q.shape
    if queries > 1:  # folding would copy the queries, and they fill a product of their own
        k, v = (a.expand(count, -1, -1, -1) for a in (k, v))
        return _attend(q, k, v, 0.0, False, attn_mask=mask, scale=pb.scale)
    prompts, kv_heads = k.shape[:2]
    q = q.reshape(prompts, -1, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(2, 3)  # [groups, Hkv, R*G, D]
    out, lse = _attend(q, k, v, 0.0, False, attn_mask=mask, scale=pb.scale)
    out, lse = (x.unflatten(2, (count // prompts, -1)).transpose(1, 2) for x in (out, lse))  # [groups, R, Hkv, G, ...]
    return out.reshape(count, heads, 1, dim), lse.reshape(count, heads, 1)


def _within(pb: Problem, at: slice) -> Tensor | None:
    """The mask `[groups, 1, 1, P]` of staged prompts of unequal length."""
    if not pb.groups.ragged:
        return None
    ends = torch.tensor(pb.groups.lens[at])[:, None, None, None]
    hidden = torch.arange(pb.groups.width) >= ends
    return torch.zeros(hidden.shape, dtype=pb.q.dtype).masked_fill_(hidden, -INF)


def _prefix_backward(
    pb: Problem, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Adds to `dq` and sums the gradients of the prefixes, rows folded and in float32 at least."""
    wide = lse.dtype
    dk, dv = (torch.zeros(a.shape, dtype=wide) for a in (pb.prefix_k, pb.prefix_v))
    for rows, start, length in pb.groups:
        if not length:
            continue
        q, do, o = (_fold(_take(x, rows), pb).to(wide) for x in (pb.q, dout, out))
        k, v = (a.narrow(1, start, length)[None].to(wide) for a in (pb.prefix_k, pb.prefix_v))
        folded_lse = _fold(_take(lse, rows)[..., None], pb)[..., 0]
        part = _attend_backward(do, q, k, v, o, folded_lse, 0.0, False, scale=pb.scale)
        dk[:, start : start + length] += part[1][0]
        dv[:, start : start + length] += part[2][0]
        if dq is not None:
            _add_rows(dq, rows, groups.unfold(part[0][0], len(rows)).reshape(len(rows), *dq.shape[1:]))
    return dq, dk, dv


def _fold(x: Tensor, pb: Problem) -> Tensor:
    """`[R, Hq, N, d]` as `[1, Hkv, R*G*N, d]`."""
    return groups.fold(x.reshape(x.shape[0], pb.prefix_k.shape[0], -1, x.shape[3]))[None]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges a part over further keys, all of its lse finite, into `out` and `lse`."""
    out.lerp_(other.to(out.dtype), torch.sigmoid(other_lse - lse)[..., None])
    torch.logaddexp(lse, other_lse, out=lse)


def _merge_rows(out: Tensor, lse: Tensor, rows: list[int], other: Tensor, other_lse: Tensor) -> None:
    span = _span(rows)
    if span is not None:
        return _merge(out[span], lse[span], other, other_lse)
    row_out, row_lse = out[rows], lse[rows]
    _merge(row_out, row_lse, other, other_lse)
    out[rows], lse[rows] = row_out, row_lse


def _add_rows(total: Tensor, rows: list[int], part: Tensor) -> None:
    span = _span(rows)
    if span is not None:
        total[span] += part
    else:
        total[rows] += part


def _take(x: Tensor, rows: list[int]) -> Tensor:
    span = _span(rows)
    return x[rows] if span is None else x[span]


def _span(rows: list[int]) -> slice | None:
    """The rows as a slice where they follow each other."""
    consecutive = rows[-1] - rows[0] + 1 == len(rows) and all(b - a == 1 for a, b in pairwise(rows))
    return slice(rows[0], rows[-1] + 1) if consecutive else None


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
