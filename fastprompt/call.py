"""One prompted call: the caller's inputs on their way to the backbone, its output on the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastprompt.batch import PrefixBatch
from fastprompt.context import Call
from fastprompt.embedding import EmbeddedRows
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.heads import classification_loss
from fastprompt.integrations.transformers import inputs as call_inputs
from fastprompt.integrations.transformers import padded_cache, positions
from fastprompt.integrations.transformers.backbone import Backbone

_NEW = 20  # transformers' own limit of a generation that is given none


@dataclass
class PreparedCall:
    """One call on its way to the backbone and its output on the way back."""

    inputs: dict[str, Any]
    call: Call
    backbone: Any
    layout: EmbeddedRows | None = None
    labels: torch.Tensor | None = None
    as_tuple: bool = False

    def embed(self, prompts: list[torch.Tensor | None], info: Backbone) -> None:
        """Replace input ids by `[prompt | text]` embeddings and move everything per-token along."""
        inputs, ids = self.inputs, self.inputs.pop("input_ids", None)
        if ids is None:
            raise ArgumentError("rows with embedding prompts need input_ids on this architecture, got inputs_embeds")
        if ids.dim() != 2 or inputs.get("position_ids") is not None:
            raise UnsupportedError("rows with embedding prompts take input_ids [B, N] without position_ids here")
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        layout = EmbeddedRows.build(self.backbone.get_input_embeddings(), ids, mask, prompts)
        if not info.encoder_decoder:
            self.check_room(info, layout.mask.sum(1))
        for name, fill in (("labels", -100), ("token_type_ids", 0)):
            value = inputs.get(name)
            if value is not None and value.shape == ids.shape and not (info.encoder_decoder and name == "labels"):
                inputs[name] = layout.scatter(value, fill)
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                inputs[name] = layout.move_positions(inputs[name])
        inputs |= {"inputs_embeds": layout.embeds, "attention_mask": layout.mask}
        self.layout = layout if not info.encoder_decoder else None

    def add_prefixes(self, batch: PrefixBatch, info: Backbone) -> None:
        """Give the rows their prefixes and move their text positions behind them."""
        if info.encoder_decoder:
            self.check_decoder(info, batch)
        else:
            mask = call_inputs.text_mask(self.inputs)
            self.check_room(info, mask.sum(1) + batch.shift(mask.device))
        if info.takes_position_ids:
            self.count_positions(batch)
        if info.path == "cache":
            self.check_window(info, batch.longest, mask)
            self.inputs = padded_cache.prepend(self.inputs, batch, mask)
        else:
            self.call.batch = batch

    def check_room(self, info: Backbone, used: torch.Tensor) -> None:
        """Refuse a call whose rows `used` `[B]`, prompt and text, do not fit the learned positions with new tokens."""
        if info.max_positions is None:
            return
        longest, new = int(used.max()), self.inputs.get("max_new_tokens") or 0
        if longest + new > info.max_positions:
            raise ArgumentError(
                f"a row of {longest} tokens with its prompt and {new} to generate need {longest + new} positions, "
                f"the backbone has {info.max_positions}: shorten the text or the prompt"
            )

    def check_window(self, info: Backbone, virtual: int, mask: torch.Tensor) -> None:
        """Refuse padding between prompts and texts where a local window counts it and may cut something off."""
        if info.counted_window is None or bool(mask[:, 0].all()):
            return
        new = self.inputs.get("max_new_tokens") or max((self.inputs.get("max_length") or _NEW) - mask.shape[1], 0)
        if virtual + mask.shape[1] + new > info.counted_window:
            raise UnsupportedError(
                f"{info.spec.model_type} counts the padding between a prompt and its text into its local window of "
                f"{info.counted_window}: pass texts of equal length, or right-padded ones to forward"
            )

    def check_decoder(self, info: Backbone, batch: PrefixBatch) -> None:
        """The same for an encoder-decoder's decoder, which must have no padding in front where it counts positions."""
        own = next((self.inputs[n] for n in ("decoder_input_ids", "labels") if self.inputs.get(n) is not None), None)
        length = own.shape[1] if own is not None else 1
        self.check_room(info, batch.shift(torch.device("cpu")) + length)
        mask = self.inputs.get("decoder_attention_mask")
        if info.counts_decoder_padding and mask is not None and not bool(mask[:, 0].all()):
            raise UnsupportedError(
                f"{info.spec.model_type} numbers padding in front of the decoder's text: pad it on the right"
            )

    def count_positions(self, batch: PrefixBatch | None) -> None:
        """Set `position_ids` `[B, N]`: over real tokens only, from the prompt's length on."""
        own = call_inputs.tokens(self.inputs)
        given = self.inputs.get("position_ids")
        if given is None:
            given = positions.text_positions(call_inputs.text_mask(self.inputs), own.shape[1])
        self.inputs["position_ids"] = given if batch is None else given + batch.shift(given.device)[:, None]

    def name_outputs(self) -> None:
        """Ask the backbone for an output with names; `finish` gives the caller a tuple if that was asked for."""
        self.as_tuple = self.inputs.get("return_dict") is False
        self.inputs.pop("return_dict", None)

    def own_loss(self) -> None:
        """Keep the labels back where heads of other sizes than the backbone's would break its loss."""
        heads, labels = self.call.heads, self.inputs.get("labels")
        if labels is not None and heads is not None and heads.labels() != {self.backbone.config.num_labels}:
            self.labels = self.inputs.pop("labels")

    def finish(self, output: Any) -> Any:
        """The backbone's output in the caller's layout, with the loss where it was kept back."""
        if self.layout is not None:
            output = self.layout.restore(output)
        if self.labels is not None:
            output["loss"] = classification_loss(output["logits"], self.labels)
        return output.to_tuple() if self.as_tuple else output
