"""Prefix Tuning: trained keys and values in every layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.prompts.prefix import TrainedPrefix
from fastprompt.spec import PARTS, BackboneSpec


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(TrainedPrefix):
    """P keys and values for every layer, optionally computed by an MLP while training.

    Semantics:
        reparameterization=None    a table [P, width]; "embedding" is another name for it
        reparameterization="mlp"   Embedding(P, embed_size) -> n x [Linear(hidden_size) -> Tanh] -> Linear(width),
                                   n = hidden_layers (1 or 2), one for each part
        init="random"              table: normal(0, init_std); MLP: torch's own init
        init="activations"         what the bare backbone computes for `init_text`, repeated or cut to P; an MLP starts
                                   there too
        dropout                    on the keys and values while training
        parts                      of an encoder-decoder, any of "encoder", "decoder" (self-attention) and "cross"
    `embed_size` None is the backbone's hidden size. An encoder-decoder's parts have keys and values of their own, P in
    each layer of each part. Source: section 4, for the init section 7.4; the authors' code for the second hidden layer,
    the parts, and an MLP that starts from activations.
    """

    method: ClassVar[str] = "prefix_tuning"
    kind: ClassVar[str] = "prefix"

    parts: tuple[str, ...] = ("decoder",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_parts()

    def _check_parts(self) -> None:
        parts = self.parts
        listed = isinstance(parts, (tuple, list)) and len(parts) > 0
        if not listed or any(part not in PARTS for part in parts) or len(set(parts)) != len(parts):
            raise ArgumentError(f'parts is {parts!r}, expected some of "encoder", "decoder" and "cross", each once')
        object.__setattr__(self, "parts", tuple(part for part in PARTS if part in parts))

    def prefix_layers(self, spec: BackboneSpec) -> tuple[int, ...]:
        if self.parts == ("decoder",):
            return super().prefix_layers(spec)
        if not spec.encoder_decoder:
            raise UnsupportedError(
                f"parts is {self.parts}, which tells the attentions of an encoder-decoder apart, and "
                f'{spec.describe()} has one stack: leave parts at ("decoder",)'
            )
        if missing := [part for part in self.parts if not spec.part(part)]:
            raise UnsupportedError(
                f"parts has {missing}, where no attention of {spec.describe()} takes a prefix: leave them out"
            )
        return tuple(i for part in self.parts for i in spec.part(part))

    def needs(self, spec: BackboneSpec) -> BackboneSpec:
        return spec.only(self.parts)
