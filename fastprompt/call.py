"""One prompted call: the caller's inputs on their way to the backbone, its output on the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastprompt.batch import PrefixBatch
from fastprompt.context import Call, activate
from fastprompt.embedding import EmbeddedRows
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.heads import RowHeads, classification_loss
from fastprompt.in_place import InPlacePrompt, VirtualTokens, stand_in
from fastprompt.integrations.transformers import inputs as call_inputs
from fastprompt.integrations.transformers import padded_cache, positions
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.library import PromptLibrary

Rows = Sequence[str | None]
_PROMPTS_ELSEWHERE = ("prompt", "adapter_names", "task_ids")  # a backbone that ignores them would run without a prompt
_USUAL = 20  # transformers' own limit of a text that is generated without one


@dataclass
class PreparedCall:
    """One call on its way to the backbone and its output on the way back."""

    inputs: dict[str, Any]
    call: Call
    backbone: Any
    layout: EmbeddedRows | None = None
    labels: torch.Tensor | None = None
    as_tuple: bool = False
    given_ids: torch.Tensor | None = None  # with the virtual tokens in place
    generating: bool = False

    def place(self, rows: Sequence[InPlacePrompt | None], info: Backbone) -> VirtualTokens:
        """Find the virtual tokens that stand in place, and leave ids behind that any backbone can look up."""
        inputs, ids = self.inputs, self.inputs.get("input_ids")
        if ids is None or ids.dim() != 2:
            raise ArgumentError("rows with virtual tokens in place need input_ids [B, N] that say where they stand")
        mask = call_inputs.text_mask(inputs)
        virtual = VirtualTokens.find(ids, mask[:, -ids.shape[1] :].bool(), rows, self.generating)
        if self.generating or inputs.get("past_key_values") is None:
            virtual.check_used(rows)
        labels = inputs.get("labels")
        if labels is not None and labels.shape == ids.shape and not info.encoder_decoder:
            inputs["labels"] = labels.masked_fill((virtual.index >= 0) & (labels < 0), -100)
        self.given_ids = ids
        inputs["input_ids"] = ids.masked_fill(ids < 0, stand_in(self.backbone.config))
        return virtual

    def embed_in_place(self, virtual: VirtualTokens, info: Backbone) -> None:
        """Let a decoder look up the text itself, and its virtual tokens as `virtual` says."""
        mask = call_inputs.text_mask(self.inputs)
        self.check_room(info, mask.sum(1), mask.shape[1])
        if not (info.takes_position_ids or bool(mask[:, 0].all())) and positions.counts_ids(self.backbone):
            raise UnsupportedError(
                f"{info.spec.model_type} numbers padding in front of input embeddings, which virtual tokens in place "
                "need: pass texts of equal length, or right-padded ones to forward"
            )
        self.call.virtual = virtual

    def embed(self, prompts: list[torch.Tensor | None], virtual: VirtualTokens | None, info: Backbone) -> None:
        """Replace input ids by `[prompt | text]` embeddings and move everything per-token along."""
        inputs, ids = self.inputs, self.inputs.pop("input_ids", None)
        if ids is None:
            raise ArgumentError("rows with embedding prompts need input_ids on this architecture, got inputs_embeds")
        if ids.dim() != 2 or inputs.get("position_ids") is not None:
            raise UnsupportedError("rows with embedding prompts take input_ids [B, N] without position_ids here")
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        text = self.backbone.get_input_embeddings()(ids)  # through the module: it may scale or be quantised
        if info.encoder_decoder:  # Pegasus' kind scales outside of the module
            text = text * getattr(self.backbone.get_encoder(), "embed_scale", 1.0)
        if virtual is not None:
            text = virtual.embed(text, virtual.index)
        layout = EmbeddedRows.build(text, mask, prompts)
        if not info.encoder_decoder:
            self.check_room(info, layout.mask.sum(1), ids.shape[1])
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
            self.check_room(info, mask.sum(1) + batch.shift(mask.device), mask.shape[1])
        if info.takes_position_ids:
            self.count_positions(batch)
        if info.path == "cache":
            self.check_window(info, batch.longest, mask)
            self.inputs = padded_cache.prepend(self.inputs, batch, mask)
        else:
            self.call.batch = batch

    def new_tokens(self, columns: int, usual: int = 0) -> int:
        """How many tokens the caller asks for behind `columns`; `usual` is the length where no limit was given."""
        if not self.generating:
            return 0
        new, longest = (call_inputs.generation_option(self.inputs, n) for n in ("max_new_tokens", "max_length"))
        return max((longest or usual) - columns, 0) if new is None else new

    def check_room(self, info: Backbone, used: torch.Tensor, columns: int) -> None:
        """Refuse a call whose rows `used` `[B]`, prompt and text, do not fit the learned positions with new tokens."""
        if info.max_positions is None:
            return
        longest, new = int(used.max()), self.new_tokens(columns)
        if longest + new > info.max_positions:
            raise ArgumentError(
                f"a row of {longest} tokens with its prompt and {new} to generate need {longest + new} positions, "
                f"the backbone has {info.max_positions}: shorten the text or the prompt"
            )

    def check_window(self, info: Backbone, virtual: int, mask: torch.Tensor) -> None:
        """Refuse padding between prompts and texts where a local window counts it and may cut something off."""
        if info.counted_window is None or bool(mask[:, 0].all()):
            return
        if virtual + mask.shape[1] + self.new_tokens(mask.shape[1], _USUAL) > info.counted_window:
            raise UnsupportedError(
                f"{info.spec.model_type} counts the padding between a prompt and its text into its local window of "
                f"{info.counted_window}: pass texts of equal length, or right-padded ones to forward"
            )

    def check_decoder(self, info: Backbone, batch: PrefixBatch) -> None:
        """The same for an encoder-decoder's decoder, which must have no padding in front where it counts positions."""
        own = next((self.inputs[n] for n in ("decoder_input_ids", "labels") if self.inputs.get(n) is not None), None)
        length = own.shape[1] if own is not None else 1
        self.check_room(info, batch.shift(torch.device("cpu")) + length, length)
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
        self.check_placed()
        if self.layout is not None:
            output = self.layout.restore(output)
        if self.labels is not None:
            output["loss"] = classification_loss(output["logits"], self.labels)
        return output.to_tuple() if self.as_tuple else output

    def check_placed(self) -> None:
        """Raise if the backbone ran past the place where virtual tokens are put in."""
        if self.call.virtual is not None and not self.call.placed:
            raise UnsupportedError(
                f"{type(self.backbone).__name__} looks up input_ids in a way that leaves no place for virtual tokens: "
                "use a prompt in front of the text"
            )

    def finish_generation(self, output: Any) -> Any:
        """What `generate` returned, starting with the caller's own ids where virtual tokens stand among them."""
        self.check_placed()
        ids, sequences = self.given_ids, output if isinstance(output, torch.Tensor) else output.sequences
        if ids is not None and self.layout is None and not self.backbone.config.is_encoder_decoder:
            sequences[:, : ids.shape[1]] = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0)
        return output


@contextmanager
def prepared(
    info: Backbone, library: PromptLibrary, rows: Rows, inputs: dict[str, Any], *, generating: bool = False
) -> Iterator[PreparedCall]:
    """Inputs for the backbone, with the rows' prefixes and heads active."""
    info.check_attention()
    call_inputs.check_masks(inputs)
    call = Call(info.owner, heads=RowHeads.build([library[r].head if r else None for r in rows]))
    rows = [library.source(r) if r else None for r in rows]  # shared virtual tokens enter once
    prompts = {name: library[name] for name in dict.fromkeys(filter(None, rows))}
    made = PreparedCall(dict(inputs), call, info.model, generating=generating)
    made.name_outputs()
    in_place = {name: prompt() for name, prompt in prompts.items() if prompt.in_place}
    in_front = {n: p() for n, p in prompts.items() if p.kind == "embedding" and not (info.compiles or p.in_place)}
    virtual = None
    if in_place:
        virtual = made.place([InPlacePrompt(r, in_place[r]) if r in in_place else None for r in rows], info)
    made.own_loss()
    keeps_ids = not in_front and (virtual is None or info.looks_up_ids)
    with ExitStack() as stack:
        if not keeps_ids:
            made.embed([in_front.get(r) if r else None for r in rows], virtual, info)
        elif virtual is not None:
            made.embed_in_place(virtual, info)
        prefixed = [r if r and r not in in_place and r not in in_front else None for r in rows]
        if any(prefixed):
            if info.path == "none":
                raise UnsupportedError(f"{info.spec.describe()} cannot take prefixes: {'; '.join(info.reasons)}")
            made.add_prefixes(stack.enter_context(library.prefix_batch(prefixed)), info)
        elif info.takes_position_ids and keeps_ids:
            made.count_positions(None)
        stack.enter_context(activate(call))
        yield made


def check_rows(prompts: str | Rows | None, inputs: dict[str, Any], library: PromptLibrary) -> list[str | None] | None:
    """A checked name or None for each row; None for a call without prompts."""
    if meant := [name for name in _PROMPTS_ELSEWHERE if name in inputs]:
        raise ArgumentError(f"{meant[0]} is no argument of a prompted model: give prompts, a name for each row")
    if prompts is None:
        return None
    count = call_inputs.batch_rows(inputs)
    if not isinstance(prompts, (str, list, tuple)):
        raise ArgumentError(f"prompts is {type(prompts).__name__}, expected a prompt's name or a list of one a row")
    rows: list[str | None] = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if bad := [r for r in rows if not (r is None or isinstance(r, str))]:
        raise ArgumentError(f"prompts has {bad[0]!r}, expected a prompt's name or None in each entry")
    if len(rows) != count:
        raise ArgumentError(f"prompts has {len(rows)} entries, the batch has {count} rows: give one name a row")
    for name in dict.fromkeys(rows):
        if name is not None:
            library[name]
    return rows


def check_generation(info: Backbone, library: PromptLibrary, rows: Rows, inputs: dict[str, Any]) -> None:
    """Refuse what a decoder could not generate correctly."""
    if not info.model.can_generate():
        raise UnsupportedError(
            f"{type(info.model).__name__} does not generate: load a backbone that ends in a text head"
        )
    embedding = [library[r] for r in rows if r and library[r].kind == "embedding"]
    if not info.compiles and any(not (p.in_place and info.looks_up_ids) for p in embedding):
        raise UnsupportedError(
            f"{info.spec.describe()} generates with prefixes only, or tokens in place: {'; '.join(info.reasons)}"
        )
    given = [n for n in ("past_key_values", "inputs_embeds") if inputs.get(n) is not None]
    if info.path == "cache" and given:
        raise UnsupportedError(
            f"{info.spec.describe()} takes prefixes through its cache, and generate cannot combine it with "
            f"{given[0]}: pass input_ids of the whole text"
        )
