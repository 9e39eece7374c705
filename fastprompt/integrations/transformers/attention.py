"""The attention function registered with transformers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastprompt import ops
from fastprompt.batch import LayerRows
from fastprompt.context import AttentionCall, Call
from fastprompt.integrations.transformers.masks import EAGER_NAME, PrefixMask, mask_function
from fastprompt.integrations.transformers.paged import PagedMask
from fastprompt.integrations.transformers.relative_bias import RelativeBias

NAME = "fastprompt"


@dataclass(frozen=True)
class Site:
    """Where an attention module stands: the prefix layers it runs as, in order of its calls in one forward.

    `layers` is empty for a module no prefix enters. `relative_bias` is that of a T5 decoder's self-attention; the
    family's encoders and cross-attention add nothing to the logits of a prefix, as in AllenAI's T5 with prefixes.
    """

    layers: tuple[int, ...]
    relative_bias: RelativeBias | None = None


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a row's prefix and its own keys: `[B, Hq, N, D]` queries to `[B, N, Hq, Dv]` outputs."""
    if isinstance(attention_mask, PagedMask):
        site: Any = module.fastprompt_site
        (layer,) = site.layers
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        return attention_mask.attend(layer, query, key, value, scale=scaling, softcap=softcap, sinks=sinks), None
    if not isinstance(attention_mask, PrefixMask):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    layer = _layer(module, attention_mask)
    if attention_mask.observer is not None:
        _observe(attention_mask.observer, module, layer, query, key, value, kwargs)
        if attention_mask.observer.blind:
            return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    if dropout:
        _warn_dropout()
    if not query.is_meta and torch.is_autocast_enabled(query.device.type):  # rotary leaves queries and keys in float32
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    return _prefix_attention(module, layer, query, key, value, attention_mask, scaling, kwargs), None


def _layer(module: Any, mask: PrefixMask) -> int | None:
    """The prefix layer as which the module runs now, None where no prefix enters it."""
    site: Site | None = getattr(module, "fastprompt_site", None)
    if site is None or not site.layers:
        return None
    return site.layers[mask.next_call(module)] if len(site.layers) > 1 else site.layers[0]


def _observe(
    call: Call,
    module: Any,
    layer: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> None:
    """Hand this call to the probe or to the compilation under way."""
    if call.probe is not None:
        bias = kwargs.get("position_bias") is not None
        same = key.shape[2] == query.shape[2]
        call.probe.append(AttentionCall(module, key, value, same, bias))
    if call.record is not None and layer is not None:
        call.record[layer] = (key, value)


def _prefix_attention(
    module: Any,
    layer: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PrefixMask,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    bias, prefix_bias = mask.bias, mask.prefix_bias
    if (position_bias := kwargs.get("position_bias")) is not None:
        bias = position_bias if bias is None else bias + position_bias
    read = None if mask.batch is None or layer is None else mask.batch.to_dtype(query.dtype).read_in(layer)
    if read is None:
        rows, prefix_key, prefix_value = _no_prefix(key, value)
    else:
        rows, prefix_key, prefix_value = read
        rows = rows.to(query.device)
        if module.fastprompt_site.relative_bias is not None:
            prefix_bias = module.fastprompt_site.relative_bias.prefix_columns(mask, query.shape[2], key.shape[2])
    out = ops.prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        rows.start,
        rows.length,
        causal=mask.causal,
        scale=scaling,
        window=mask.window,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        q_start=mask.q_start,
        kv_start=mask.kv_start,
        kv_len=mask.kv_len,
        bias=bias,
        prefix_bias=prefix_bias,
        plan=rows.plan,
    )
    return cast(torch.Tensor, out)


def _no_prefix(key: torch.Tensor, value: torch.Tensor) -> tuple[LayerRows, torch.Tensor, torch.Tensor]:
    """Rows that read nothing, and an arena of no tokens."""
    _, heads, _, dim = key.shape
    return (
        LayerRows.none(key.shape[0], key.device),
        key.new_empty(heads, 0, dim),
        value.new_empty(heads, 0, value.shape[3]),
    )


def _warn_dropout() -> None:
    warnings.warn(
        "attention dropout is not applied on prompted rows: fastprompt computes attention in one fused op. "
        "Dropout elsewhere in the backbone is unchanged.",
        stacklevel=2,
    )


for _name in (NAME, EAGER_NAME):  # on import: a model from a pickle has the name in its config already
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, mask_function)
