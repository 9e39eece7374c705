"""Prefix attention by flash-attn: each prompt once with all its rows' queries, own keys row by row, merged by lse.

Prefixes are read where they lie, own keys too unless heads come before tokens, which costs a copy. Index arguments are
read on the host. flash-attn's own backward knows no gradient of lse: gradients come from another implementation,
which takes weights from the merged lse.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt._eager.groups import Groups
from fastprompt._eager.problem import Problem, build
from fastprompt._flash.varlen import Piece, attend
from fastprompt.arguments import PrefixAttention
from fastprompt.errors import ImplementationError

_INF = float("inf")
State = tuple[Tensor, Tensor]  # out [B, N, Hq, D] and lse [B, Hq, N]


def forward(call: PrefixAttention, plan: Tensor | None, need_lse: bool) -> State:
    """`out [B, N, Hq, D]` and `lse [B, Hq, N]` (`[0]` unless needed)."""
    _refuse(call)
    q, sinks, pb = call.q, call.sinks, build(call, plan)
    rows, heads, queries, dim = q.shape
    state = q.new_zeros(rows, queries, heads, dim), q.new_full((rows, heads, queries), -_INF, dtype=torch.float32)
    if q.numel():
        merge = _kernels("merge_states")
        found = [*_prefix_states(pb), *_own_states(pb)]
        state = found[0] if found else state
        for other in found[1:]:
            state = merge.forward(*state, *other)
    out, lse = state if sinks is None else _with_sinks(*state, sinks)
    return out.contiguous(), lse.contiguous() if need_lse else lse.new_empty(0)


def backward(*args: object) -> tuple[Tensor, ...]:
    """Gradients as `fastprompt._eager.prefix_attention.backward` gives them, by Triton kernels where these run."""
    return _kernels("prefix_attention").backward(*args)


def _kernels(op: str) -> ModuleType:
    """An op in Triton where that runs, or in plain PyTorch, whatever FASTPROMPT_IMPL says."""
    return dispatch.kernels(op, "triton" if dispatch.obstacle(op, "triton") is None else "reference")


def _refuse(call: PrefixAttention) -> None:
    names = [name for name in ("bias", "prefix_bias", "window") if getattr(call, name) is not None]
    if names:
        raise ImplementationError(f"impl 'flash' got {names[0]}, which it does not compute; use impl=None")
    if call.v.shape[3] != call.q.shape[3]:
        raise ImplementationError(
            f"impl 'flash' got q and v with head sizes {call.q.shape[3]} and {call.v.shape[3]}, expected the same; "
            "use impl=None"
        )


def _prefix_states(pb: Problem) -> list[State]:
    """Attention over the prefixes, in as many calls as prompts overlap."""
    rows, _, queries, _ = pb.q.shape
    order, groups = _by_place(pb.groups)
    if not groups:
        return []
    inverse = sorted(range(rows), key=order.__getitem__)
    q = _tokens(_rows(pb.q, order))
    k, v = pb.prefix_k.transpose(0, 1), pb.prefix_v.transpose(0, 1)
    states = []
    while groups:
        chosen: list[Piece] = []
        rest: list[Piece] = []
        end = 0
        for piece in groups:  # those that begin behind the last one chosen
            apart = piece.first_key >= end
            (chosen if apart else rest).append(piece)
            end = piece.end_key if apart else end
        pieces = [Piece(a * queries, b * queries, first, last) for a, b, first, last in chosen]
        state = _unpacked(attend(q, k, v, pieces, False, pb.scale, pb.softcap), rows)
        states.append((_rows(state[0], inverse), _rows(state[1], inverse)))
        groups = rest
    return states


def _by_place(groups: Groups) -> tuple[list[int], list[Piece]]:
    """All rows, by where their prefix begins, and for each prompt which of these rows read which tokens."""
    order: list[int] = []
    pieces = []
    for rows, start, length in sorted(groups, key=lambda group: (group[2] == 0, group[1])):
        if length:
            pieces.append(Piece(len(order), len(order) + len(rows), start, start + length))
        order += rows
    return order, pieces


def _own_states(pb: Problem) -> list[State]:
    """Attention over the rows' own keys: of queries among them, and of queries behind them, which see them all."""
    rows, _, queries, _ = pb.q.shape
    size = pb.k.shape[2]
    among, behind = [], []
    for b, (start, end, query) in enumerate(zip(pb.start, pb.end, pb.query, strict=True)):
        cut = min(max(end - query, 0), queries) if pb.causal else 0
        first, key = b * queries, b * size
        if query + cut > start and cut:
            among.append(Piece(first, first + cut, key + start, key + query + cut))
        if end > start and cut < queries:
            behind.append(Piece(first + cut, first + queries, key + start, key + end))
    q, k, v = _tokens(pb.q), _tokens(pb.k), _tokens(pb.v)
    return [
        _unpacked(attend(q, k, v, pieces, causal, pb.scale, pb.softcap), rows)
        for pieces, causal in ((among, True), (behind, False))
        if pieces
    ]


def _tokens(x: Tensor) -> Tensor:
    """`[B, H, n, D]` as `[B * n, H, D]`, a view where tokens follow each other at one distance."""
    return x.transpose(1, 2).flatten(0, 1)


def _unpacked(state: State, rows: int) -> State:
    """Of `[B * N, Hq, D]` and `[Hq, B * N]`."""
    out, lse = state
    return out.unflatten(0, (rows, -1)), lse.unflatten(1, (rows, -1)).transpose(0, 1)


def _rows(x: Tensor, order: list[int]) -> Tensor:
    """The rows of `x` in this order."""
    return x if order == sorted(order) else x[torch.tensor(order, device=x.device)]


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> State:
    """A logit a head that takes weight and adds no value."""
    total = torch.logaddexp(lse, sinks.float()[:, None])
    share = torch.where(lse == -_INF, 0.0, (lse - total).exp())
    return (out * share.transpose(1, 2)[..., None]).to(out.dtype), total
