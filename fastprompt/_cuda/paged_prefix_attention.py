"""Prefix attention of rows of one query over a paged own cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt import native
from fastprompt.arguments import PagedPrefixAttention
from fastprompt.plan import SHARERS, sharing_capacity

kernels = native.load_cuda()
_FAR = 2**30  # a window no sequence reaches


def forward(
    call: PagedPrefixAttention,
    plan: Tensor | None,
    sharing: Tensor | None,
    need_lse: bool,
    prefix_scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, D]` and `lse [Hq, tokens]` (`[0]` unless needed).

    `prefix_k` and `prefix_v` may be `torch.float8_e4m3fn`, with strides of whole 16 bytes: numbers that
    `prefix_scales`, float32 `[Hkv]` of keys and of values, multiply. The op takes no such prefixes; only this does.
    """
    q, sinks, window = call.q, call.sinks, call.window
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1::-1] if need_lse else (0,), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    tile_of_row, tiles = _lists(None if window is not None else sharing)
    # what is converted must live until the launch: the workspace would get its memory
    table, begins, lens = map(_index, (call.block_table, call.q_start, call.kv_len))
    starts, lengths = map(_index, (call.prefix_start, call.prefix_len))
    logits = None if sinks is None else (sinks.float() if sinks.dtype == torch.float64 else sinks).contiguous()
    launch = kernels.Decode(
        out, lse if need_lse else None, q, call.k_cache, call.v_cache, table, begins, lens, call.prefix_k,
        call.prefix_v, starts, lengths, logits, tile_of_row, tiles, call.scale, min(window or 0, _FAR),
        call.softcap or 0.0, q.device.index or 0, *(prefix_scales or (None, None)),
    )  # fmt: skip
    room = launch.workspace_bytes
    workspace = q.new_empty(room, dtype=torch.uint8) if room else None
    launch.run(0 if workspace is None else workspace.data_ptr(), room, _stream(q))
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
