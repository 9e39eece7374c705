"""The mask function registered with transformers: ranges where it can, a dense bias where it must."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from fastprompt.batch import PrefixBatch
from fastprompt.context import Call, active
from fastprompt.errors import UnsupportedError
from fastprompt.integrations.transformers.paged import PagedMask

EAGER_NAME = "fastprompt_eager"


@dataclass(eq=False)
class PrefixMask:
    """What the attention function needs to know about a forward; travels in place of the attention mask.

    Being an argument of every layer, it is kept by gradient checkpointing and reaches a compiled forward.
    `q_start`, `kv_start`, `kv_len` are int32 `[B]` as in `ops.prefix_attention`; `bias` is added to own-key logits
    `[B|1, 1, N|1, S]`, `prefix_bias` to prefix logits. `observer` wants to see keys and values (probe, compilation).
    """

    batch: PrefixBatch | None
    causal: bool
    window: int | None = None
    q_start: torch.Tensor | None = None
    kv_start: torch.Tensor | None = None
    kv_len: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    prefix_bias: torch.Tensor | None = None
    observer: Call | None = None
    calls: dict[int, int] = field(default_factory=dict)
    ndim = 4  # transformers asks a prepared mask for its rank and passes rank 4 through

    def contiguous(self) -> PrefixMask:
        return self

    def next_call(self, module: torch.nn.Module) -> int:
        """How often `module` ran before in this forward (ALBERT runs one module as every layer)."""
        count = self.calls.get(id(module), 0)
        self.calls[id(module)] = count + 1
        return count


@dataclass(frozen=True)
class Structure:
    """A mask function that was understood: causal or not, sliding window or chunk."""

    causal: bool
    window: int | None = None
    chunk: int | None = None


def _free_variables(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def structure_of(mask_function: Callable[..., Any]) -> Structure | None:
    """What transformers' composed mask function means, or None for one we do not know."""
    if mask_function is causal_mask_function:
        return Structure(causal=True)
    if mask_function is bidirectional_mask_function:
        return Structure(causal=False)
    parts = _free_variables(mask_function).get("mask_functions")
    if mask_function.__name__ != "and_mask" or parts is None or len(parts) != 2:
        return None
    overlay, base = parts
    if base not in (causal_mask_function, bidirectional_mask_function):
        return None
    causal, free = base is causal_mask_function, _free_variables(overlay)
    match overlay.__qualname__.split(".")[0]:
        case "sliding_window_overlay":
            return Structure(causal, window=free["sliding_window"])
        case "sliding_window_bidirectional_overlay":  # its distance is inclusive, ours exclusive
            return Structure(causal, window=free["sliding_window"] + 1)
        case "chunked_overlay":
            return Structure(causal, chunk=free["chunk_size"])
    return None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """Build the mask of one forward: fastprompt's own under an active call, transformers' otherwise."""
    if isinstance(attention_mask, PrefixMask):  # prepared before a compiled forward
        return attention_mask
    call = active()
    call = call if call is not None and call.owner.has(config) else None
    sizes = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    if call is not None and call.paged is not None:
        return _paged(call.paged, mask_function, config)
    bare = call is None or (call.batch is None and not call.observes)
    if bare and config._attn_implementation != EAGER_NAME:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            mask_function=mask_function, attention_mask=attention_mask, device=device, dtype=dtype, **sizes, **kwargs
        )
    batch = call.batch_of(batch_size) if call is not None else None
    known = structure_of(mask_function)
    if known is None:
        mask = _dense(batch, mask_function, attention_mask, config, sizes, device, dtype, kwargs)
    else:
        mask = _ranges(batch, known, attention_mask, sizes, device, dtype)
        if known.chunk is not None:
            _add_chunks(mask, known.chunk, sizes, device, dtype)
    mask.observer = call if call is not None and call.observes else None
    return mask


def _paged(step: PagedMask, function: Callable[..., Any], config: Any) -> PagedMask:
    """A packed step's mask for layers whose pattern `function` describes."""
    known = structure_of(function)
    if known is None or not known.causal or known.chunk is not None:
        raise UnsupportedError(
            f"{config.model_type} has an attention pattern that packed rows cannot have: expected causal attention, "
            "with a sliding window or without"
        )
    return step.within(known.window)


def _index(value: int | torch.Tensor, rows: int, device: torch.device | str) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.int32, device=device).expand(rows)


def _ranges(
    batch: PrefixBatch | None,
    known: Structure,
    padding: torch.Tensor | None,
    sizes: dict[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
) -> PrefixMask:
    """A mask given by one range of real keys a row; holes inside the range become a `[B, 1, 1, S]` bias."""
    rows, q_length, kv_length = sizes["batch_size"], sizes["q_length"], sizes["kv_length"]
    q_offset, kv_offset = sizes["q_offset"], sizes["kv_offset"]
    mask = PrefixMask(batch, known.causal, known.window)
    growing = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if known.causal and not growing:  # a static cache: the queries are not the last of its keys
        mask.q_start = _index(q_offset - kv_offset, rows, device)
    if padding is None:
        if kv_offset:
            mask.kv_start = _index(-kv_offset, rows, device)
        return mask
    real = padding.bool()
    count = real.sum(1)
    start = real.int().argmax(1)
    end = real.shape[1] - real.flip(1).int().argmax(1)
    end = torch.where(count == 0, start, end)
    mask.kv_start = (start - kv_offset).to(torch.int32)
    mask.kv_len = (end - kv_offset).clamp(0, kv_length).to(torch.int32)
    if not real.is_meta and bool((end - start != count).any()):
        if batch is not None and (known.window or known.chunk):
            raise UnsupportedError(
                "attention_mask has holes between real tokens, and the backbone has a local window, which would count "
                "them: remove the gaps"
            )
        own = real[:, kv_offset : kv_offset + kv_length]
        own = torch.nn.functional.pad(own, (0, kv_length - own.shape[1]))
        mask.bias = _additive(own[:, None, None], dtype)
    return mask


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _dense(
    batch: PrefixBatch | None,
    function: Callable[..., Any],
    padding: torch.Tensor | None,
    config: Any,
    sizes: dict[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> PrefixMask:
    """A mask function we cannot read (packed sequences, image blocks): dense over own keys, prefix visible to all."""
    local = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if batch is not None and local:
        raise UnsupportedError(
            f"the attention mask of {config.model_type} combines a local window of {local} with a custom pattern; "
            "fastprompt cannot tell which queries see the prompt. Pass a 2-D attention_mask without packed sequences."
        )
    kwargs = kwargs | dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    own: Any = sdpa_mask(mask_function=function, attention_mask=padding, device=device, **sizes, **kwargs)
    return PrefixMask(batch, causal=False, bias=_additive(own, dtype))


def _add_chunks(
    mask: PrefixMask, chunk: int, sizes: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> None:
    """Chunked attention (Llama 4): positions, counted with the prompt in front, see their own chunk only."""
    rows = sizes["batch_size"]
    zeros = torch.zeros(rows, dtype=torch.long, device=device)
    prompt = mask.batch.shift(torch.device(device)) if mask.batch is not None else zeros
    origin = (prompt - (mask.kv_start if mask.kv_start is not None else zeros))[:, None]
    q_first = mask.q_start[:, None] if mask.q_start is not None else sizes["kv_length"] - sizes["q_length"]
    query = (torch.arange(sizes["q_length"], device=device) + q_first + origin) // chunk
    key = (torch.arange(sizes["kv_length"], device=device) + origin) // chunk
    same = _additive((query[:, :, None] == key[:, None])[:, None], dtype)
    mask.bias = same if mask.bias is None else mask.bias + same
    if mask.batch is not None:
        prefix = torch.arange(mask.batch.longest, device=device) // chunk
        mask.prefix_bias = _additive((query[:, :, None] == prefix)[:, None], dtype)
