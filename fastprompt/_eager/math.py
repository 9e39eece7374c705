"""Prefix attention as matrix products and one joint softmax: every feature, any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastprompt._eager import groups
from fastprompt._eager.problem import INF, Problem


@dataclass(frozen=True)
class Logits:
    """Joint logits `[B, Hq, N, P+S]` (hidden ones -inf) and, under softcap, their capped values before biases."""

    values: Tensor
    capped: Tensor | None


def forward(pb: Problem, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`out [B, Hq, N, Dv]` in the computing dtype and `lse [B, Hq, N]`."""
    pb = _wide(pb)
    logits = _logits(pb).values
    if not need_lse and pb.sinks is None and pb.bias is None and pb.prefix_bias is None and pb.all_see:
        p, lse = logits.softmax(-1), None
    else:
        p, lse = _normalise(logits, pb.sinks)
    out = _mix(pb, p)
    if pb.padded and not bool(out.sum().isfinite()):  # padding may hold NaN, and 0 * NaN is NaN
        out = _mix(pb.without_padding(), p)
    return out, lse


def backward(
    pb: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias; `dout`, `out` are `[B, Hq, N, Dv]`."""
    pb = _wide(pb.without_padding())
    width, tokens = pb.groups.width, pb.prefix_k.shape[1]
    dout = dout.to(pb.q.dtype)
    logits = _logits(pb)
    p, _ = _normalise(logits.values, pb.sinks)
    delta = (dout * out).sum(-1)  # [B, Hq, N]
    if dlse is not None:
        delta = delta - dlse.masked_fill(lse == -INF, 0.0)
    rows = _rows(dout, pb)  # [B, Hkv, M, Dv]
    dp = _heads(torch.cat([groups.scores(rows, pb.prefix_v, pb.groups, 0.0), _batched(rows, pb.v.mT)], -1), pb)
    dz = p * (dp - delta[..., None])
    grads: list[Tensor | None] = [None] * 8
    if wanted[5] and pb.sinks is not None:
        share = (pb.sinks[:, None] - lse).exp()
        grads[5] = -(share * delta).sum((0, 2))
    if wanted[6] and pb.bias is not None:
        grads[6] = dz[..., width:].sum_to_size(pb.bias.shape)
    if wanted[7] and pb.prefix_bias is not None:
        spare = pb.prefix_bias.shape[3] - width
        shape = (*pb.prefix_bias.shape[:3], width)
        grads[7] = torch.nn.functional.pad(dz[..., :width].sum_to_size(shape), (0, spare))
    if logits.capped is not None and pb.softcap is not None:
        dz = dz * (1 - (logits.capped / pb.softcap).square())
    p, dz, q = _rows(p, pb), _rows(dz, pb), _rows(pb.q, pb) * pb.scale
    if wanted[0]:
        dq = _batched(dz[..., width:], pb.k) + groups.mix(dz[..., :width], pb.prefix_k, pb.groups)
        grads[0] = _heads(dq, pb) * pb.scale
    if wanted[1]:
        grads[1] = torch.matmul(dz[..., width:].mT, q)
    if wanted[2]:
        grads[2] = torch.matmul(p[..., width:].mT, rows)
    if wanted[3]:
        grads[3] = groups.outer(dz[..., :width], q, tokens, pb.groups)
    if wanted[4]:
        grads[4] = groups.outer(p[..., :width], rows, tokens, pb.groups)
    return grads


def _wide(pb: Problem) -> Problem:
    """Low-precision rows in float32; the prefix is widened extent by extent where it is read."""
    if pb.q.dtype in (torch.float32, torch.float64):
        return pb
    return replace(pb, q=pb.q.float(), k=pb.k.float(), v=pb.v.float())


def _rows(x: Tensor, pb: Problem) -> Tensor:
    """`[B, Hq, N, d]` with the heads of one kv head folded into rows: `[B, Hkv, G*N, d]`."""
    batch, _, queries, d = x.shape
    kv_heads = pb.prefix_k.shape[0]
    return x.reshape(batch, kv_heads, x.shape[1] // kv_heads * queries, d)


def _heads(x: Tensor, pb: Problem) -> Tensor:
    """Inverse of `_rows`."""
    batch, heads, queries, _ = pb.q.shape
    return x.reshape(batch, heads, queries, x.shape[3])


def _logits(pb: Problem) -> Logits:
    q = _rows(pb.q, pb) * pb.scale
    width = pb.groups.width
    prefix = groups.scores(q, pb.prefix_k, pb.groups, -INF)
    z = _heads(torch.cat([prefix, _batched(q, pb.k.mT)], dim=-1), pb)
    capped = None
    if pb.softcap is not None:
        capped = pb.softcap * torch.tanh(z / pb.softcap)
        z = capped.clone()
    if pb.bias is not None:
        z[..., width:] += pb.bias
    if pb.prefix_bias is not None:
        z[..., :width] += pb.prefix_bias[..., :width]
    if pb.own_mask is not None:
        z[..., width:].masked_fill_(~pb.own_mask, -INF)
    altered = pb.softcap is not None or pb.prefix_bias is not None
    if pb.window_cuts_prefix or (altered and pb.groups.ragged):
        z[..., :width].masked_fill_(~pb.prefix_mask(), -INF)
    return Logits(z, capped)


def _normalise(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, zeros for a query that sees nothing, and the log of their denominator `[B, Hq, N]`."""
    shape = (*logits.shape[:3], 1)
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_full(shape, -INF)
    if sinks is not None:
        sinks = sinks.to(logits.dtype)[:, None, None]
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -INF, 0.0)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    lse = (top + total.log())[..., 0]
    return weights.div_(total.masked_fill_(total == 0, 1.0)), lse


def _mix(pb: Problem, p: Tensor) -> Tensor:
    """Weighted values `[B, Hq, N, Dv]`."""
    width = pb.groups.width
    p = _rows(p, pb)
    out = _batched(p[..., width:], pb.v)
    if width:
        out = out + groups.mix(p[..., :width], pb.prefix_v, pb.groups)
    return _heads(out, pb)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """`[B, H, m, k] @ [B, H, k, n]` without copying `b`."""
    if b.shape[0] == 1 or b.shape[1] == 1 or b.stride(0) == b.shape[1] * b.stride(1):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, b.shape[:2])
    return torch.stack([torch.bmm(a[:, h], b[:, h]) for h in range(b.shape[1])], dim=1)
