"""The compatible path: prefixes as ordinary past keys and values, copied for every row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from fastprompt.batch import PrefixBatch
from fastprompt.errors import UnsupportedError


class PaddedPrefixCache(DynamicCache):
    """A cache that starts with every row's prefix, padded on the left to the longest.

    `prefix_mask` int64 `[B, Pmax]` is 1 at the columns that hold a prefix token.
    """

    def __init__(self, batch: PrefixBatch) -> None:
        super().__init__()
        device = batch.keys[0].device
        columns = torch.arange(batch.longest, device=device)
        lengths = batch.shift(device)[:, None]
        self.prefix_mask = (columns >= batch.longest - lengths).long()
        for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
            if any(e is not None and layer not in e.layers for e in batch.extents):
                raise UnsupportedError(
                    f"a prompt of chosen layers (layer {layer} is not among them) needs an architecture that honours "
                    "transformers' attention interface: past_key_values cannot hide a prefix from one layer"
                )
            rows = batch.layer_rows[layer]
            index = rows.start.long()[:, None] + columns - (batch.longest - lengths)
            index = torch.where(self.prefix_mask.bool(), index, 0)
            here = self.prefix_mask.bool()[:, None, :, None]
            own, past = (t[:, index].transpose(0, 1).where(here, 0) for t in (keys, values))
            self.update(own, past, layer)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the base class; at the first step of a beam search the rows become beams."""
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is not None and layer.is_initialized and layer.keys.shape[0] < key_states.shape[0]:
            layer.batch_repeat_interleave(key_states.shape[0] // layer.keys.shape[0])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def prefix_length(self) -> int:
        return self.prefix_mask.shape[1]


def prepend(inputs: dict[str, Any], batch: PrefixBatch, text_mask: torch.Tensor) -> dict[str, Any]:
    """`inputs` with the prefixes as past keys and their columns in the attention mask."""
    cache = inputs.get("past_key_values")
    if cache is None:
        cache = PaddedPrefixCache(batch)
    elif not isinstance(cache, PaddedPrefixCache):
        raise UnsupportedError(
            f"past_key_values is a {type(cache).__name__}, but this architecture keeps prefixes in the cache: "
            "pass the one an earlier prompted call returned, or none"
        )
    mask = torch.cat([cache.prefix_mask.to(text_mask), text_mask], dim=1)
    return inputs | {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
