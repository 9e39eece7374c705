"""Prefix attention, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprompt._eager import prefix_attention as eager
from fastprompt._triton import tiles
from fastprompt._triton.launch import dense, launch, placed, rows_contiguous, target
from fastprompt._triton.prefix_attention_backward_keys import (
    prefix_attention_bwd_own_kernel,
    prefix_attention_bwd_prefix_kernel,
)
from fastprompt._triton.prefix_attention_backward_queries import (
    prefix_attention_bwd_delta_kernel,
    prefix_attention_bwd_queries_kernel,
)
from fastprompt._triton.prefix_attention_forward import prefix_attention_fwd_kernel
from fastprompt.arguments import PrefixAttention

_LARGEST_SINGLE = 128  # in float32, for gradients: larger tiles find no room in registers, and are left to torch
FAR = 2**30  # a window no sequence reaches


def forward(call: PrefixAttention, plan: Tensor | None, need_lse: bool) -> tuple[Tensor, Tensor]:
    """`out [B, N, Hq, Dv]` and `lse [B, Hq, N]` (`[0]` unless needed)."""
    q, k = call.q, call.k
    rows, heads, queries, _ = q.shape
    out = q.new_empty(rows, queries, heads, call.v.shape[3])
    lse = q.new_empty((rows, heads, queries) if need_lse else (0,), dtype=torch.float32)
    if out.numel() == 0 and not need_lse:
        return out, lse
    given = Given.build(call)
    group = given.meta["GROUP"]
    tile = tiles.forward(given.dim, q.dtype, queries * group, given.rich)
    launch(
        prefix_attention_fwd_kernel, rows * k.shape[1] * -(-queries * group // tile.rows), q, tile,
        *given.inputs, out, lse if need_lse else None, *given.indices, dense(call.sinks), *given.numbers,
        BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys, **given.meta,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: PrefixAttention,
    plan: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, laid out as these; `[0]` where not wanted."""
    q, k, v, sinks, biases = call.q, call.k, call.v, call.sinks, (call.bias, call.prefix_bias)
    if q.dtype == torch.float32 and max(q.shape[3], v.shape[3]) > _LARGEST_SINGLE:
        return eager.backward(dout, dlse, out, lse, call, plan, wanted)
    given = Given.build(call)
    dout = rows_contiguous(dout)
    delta = _delta(dout, dlse, out, lse)
    tensors = (*given.inputs, dout, lse, delta)
    dq, dk, dv = (target(x, w) for x, w in zip((q, k, v), wanted, strict=False))
    slopes = [  # a bias is broadcast over logits: its gradient is a sum of theirs
        None if b is None or not w else q.new_zeros(*q.shape[:3], b.shape[3], dtype=torch.float32)
        for b, w in zip(biases, wanted[6:], strict=True)
    ]
    if dq is not None or any(s is not None for s in slopes):
        tile = tiles.backward_queries(given.dim, q.dtype, given.rich)
        launch(
            prefix_attention_bwd_queries_kernel,
            q.shape[0] * k.shape[1] * -(-q.shape[2] * given.meta["GROUP"] // tile.rows), q, tile, *tensors, dq, *slopes,
            *given.indices, _steps(dout), _steps(dq), *given.numbers, BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys,
            **given.meta,
        )  # fmt: skip
    tile = tiles.backward_keys(given.dim, q.dtype, given.rich)
    if dk is not None or dv is not None:
        launch(
            prefix_attention_bwd_own_kernel, q.shape[0] * k.shape[1] * -(-k.shape[2] // tile.keys), q, tile, *tensors,
            dk, dv, *given.indices, _steps(dout), _steps(dk), _steps(dv), *given.numbers, BLOCK_ROWS=tile.rows,
            BLOCK_KEYS=tile.keys, **given.meta,
        )  # fmt: skip
    rooms = (dq, dk, dv, *_prefix_gradients(given, tensors, tile, wanted[3:5]))
    none = q.new_empty(0)
    return (
        *(none if room is None else placed(room, x) for room, x in zip(rooms, given.inputs, strict=True)),
        none if sinks is None or not wanted[5] else _sinks(sinks, lse, delta),
        *(none if s is None else _like(b, s) for b, s in zip(biases, slopes, strict=True)),
    )


@dataclass(frozen=True)
class Given:
    """What all kernels of a call are given, in their order of parameters."""

    inputs: tuple[Tensor, ...]
    indices: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def dim(self) -> int:
        """The larger block of head sizes."""
        return max(self.meta["BLOCK_D"], self.meta["BLOCK_DV"])

    @property
    def rich(self) -> bool:
        """Whether logits are more than products: biased, bent, or cut by a window."""
        bias, prefix_bias, *_, softcap, window, _ = self.numbers
        return any(x is not None for x in (bias, prefix_bias, softcap, window))

    @classmethod
    def build(cls, call: PrefixAttention) -> Given:
        q, k, v, prefix_k, bias, prefix_bias = *call[:4], call.bias, call.prefix_bias
        indices = (call.prefix_start, call.prefix_len, call.kv_start, call.kv_len, call.q_start)
        dims = {"DIM": q.shape[3], "DIM_V": v.shape[3]}
        numbers = (
            bias, prefix_bias, *(x.stride()[:-1] for x in call[:5]), _broadcast(bias), _broadcast(prefix_bias),
            prefix_k.shape[1], k.shape[2], q.shape[2], 0 if prefix_bias is None else prefix_bias.shape[3],
            call.scale, call.softcap, None if call.window is None else min(call.window, FAR), k.shape[1],
        )  # fmt: skip
        meta = dims | {
            "GROUP": q.shape[1] // k.shape[1],
            "BLOCK_D": tiles.block(q.shape[3]),
            "BLOCK_DV": tiles.block(v.shape[3]),
            "CAUSAL": call.causal,
            "PRECISION": "ieee",
        }
        return cls(call[:5], tuple(map(dense, indices)), numbers, meta)


def _broadcast(bias: Tensor | None) -> tuple[int, ...]:
    """Strides of a bias, 0 in dimensions that are repeated."""
    if bias is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """`sum(dout * out) - dlse`, `[B, Hq, N]`."""
    delta = torch.empty_like(lse)
    size = tiles.block(out.shape[3])
    tile = tiles.Tiles(max(1, 8192 // size), 0, 8, 1)
    launch(
        prefix_attention_bwd_delta_kernel, -(-delta.numel() // tile.rows), dout, tile,
        dout, None if dlse is None else dlse.contiguous(), out, delta, _steps(dout), out.shape[1], out.shape[2],
        delta.numel(), DIM_V=out.shape[3], BLOCK_DV=size, BLOCK_ROWS=tile.rows,
    )  # fmt: skip
    return delta


def _prefix_gradients(
    given: Given, tensors: tuple[Tensor, ...], tile: tiles.Tiles, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the arena: written at once, or in float32 a part of the batch, and the parts summed in order."""
    q, arenas = tensors[0], tensors[3:5]
    if not any(wanted):
        return None, None
    kv_heads, tokens, _ = arenas[0].shape
    programs = -(-tokens // tile.keys) * kv_heads
    splits = tiles.splits(programs, q.shape[0])
    if splits == 1:
        rooms = [target(x, w) for x, w in zip(arenas, wanted, strict=True)]
        steps = [(0, *_steps(room)) for room in rooms]
    else:
        rooms = [
            q.new_empty(splits, *x.shape, dtype=torch.float32) if w else None
            for x, w in zip(arenas, wanted, strict=True)
        ]
        steps = [_steps(room) for room in rooms]
    launch(
        prefix_attention_bwd_prefix_kernel, programs * splits, q, tile, *tensors, *rooms, *given.indices,
        _steps(tensors[5]), *steps, q.shape[0], splits, *given.numbers, BLOCK_ROWS=tile.rows, BLOCK_KEYS=tile.keys,
        **given.meta,
    )  # fmt: skip
    if splits > 1:
        rooms = [None if room is None else room.sum(0) for room in rooms]
    return rooms[0], rooms[1]


def _sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink takes weight from all values and gives none of its own."""
    weights = (sinks.float()[:, None] - lse).exp().where(lse > -float("inf"), 0.0)
    return _like(sinks, -(weights * delta).sum((0, 2)))


def _like(x: Any, grad: Tensor) -> Tensor:
    """A gradient summed to the shape of its input, in its layout and dtype."""
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape))


def _steps(x: Tensor | None) -> tuple[int, ...]:
    """Strides of all dimensions but the last."""
    return (0, 0, 0) if x is None else x.stride()[:-1]
