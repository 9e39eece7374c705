"""Prefix attention of rows of one query over a paged own cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.plan import SHARERS, sharing_capacity

kernels = native.load_cuda()
_FAR = 2**30  # a window no sequence reaches


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    sinks: Tensor | None,
    plan: Tensor | None,
    sharing: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    need_lse: bool,
    prefix_scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, D]` and `lse [Hq, tokens]` (`[0]` unless needed).

    `prefix_k` and `prefix_v` may be `torch.float8_e4m3fn`, with strides of whole 16 bytes: numbers that
    `prefix_scales`, float32 `[Hkv]` of keys and of values, multiply. The op takes no such prefixes; only this does.
    """
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1::-1] if need_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    tile_of_row, tiles = _lists(None if window is not None else sharing)
    # what is converted must live until the launch: the workspace would get its memory
    table, begins, lens, starts, lengths = map(_index, (block_table, q_start, kv_len, prefix_start, prefix_len))
    logits = None if sinks is None else (sinks.float() if sinks.dtype == torch.float64 else sinks).contiguous()
    call = kernels.Decode(
        out, lse if need_lse else None, q, k_cache, v_cache, table, begins, lens, prefix_k, prefix_v, starts, lengths,
        logits, tile_of_row, tiles, scale, min(window or 0, _FAR), softcap or 0.0, q.device.index or 0,
        *(prefix_scales or (None, None)),
    )  # fmt: skip
    room = call.workspace_bytes
    workspace = q.new_empty(room, dtype=torch.uint8) if room else None
    call.run(0 if workspace is None else workspace.data_ptr(), room, _stream(q))
    return out, lse


def _lists(sharing: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`tile_of_row [C]` and `tiles [C // 4, SHARERS]` of a plan; None where nobody shares."""
    if sharing is None:
        return None, None
    capacity = sharing_capacity(sharing)
    if capacity == sharing.shape[0]:  # too few rows for a tile
        return None, None
    return sharing[:capacity], sharing[capacity:].view(-1, SHARERS)


def _index(x: Tensor) -> Tensor:
    """An index tensor as the kernel reads it: int32, of a table the rows at any distance."""
    x = x if x.dtype == torch.int32 else x.to(torch.int32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _stream(x: Tensor) -> int:
    """The current stream of the tensor's device."""
    stream: int = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return stream
