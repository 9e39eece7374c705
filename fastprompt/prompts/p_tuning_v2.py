"""P-Tuning v2: deep prompts for all or chosen layers (Liu et al. 2021, arXiv 2110.07602)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import resolve_layers
from fastprompt.prompts.prefix import TrainedPrefix
from fastprompt.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class PTuningV2(TrainedPrefix):
    """P keys and values for the chosen layers, optionally computed by an MLP while training.

    Semantics:
        layers=None                all layers; else indices, negative ones from the end: (-1, -2) is the top two
        reparameterization=None    a table [P, width]; "embedding" is another name for it
        reparameterization="mlp"   Embedding(P, embed_size) -> n x [Linear(hidden_size) -> Tanh] -> Linear(width),
                                   n = hidden_layers (1 or 2)
        init="random"              table: normal(0, init_std); MLP: torch's own init
        init="activations"         what the bare backbone computes for `init_text`, repeated or cut to P; an MLP starts
                                   there too
        dropout                    on the keys and values while training
    `embed_size` None is the backbone's hidden size. Layers below the lowest chosen one take no part in the backward.
    Source: the paper's prompt optimisation, its reparameterisations Embedding and MLP, and its study of prompt depth
    (chosen layers); the authors' prefix encoder. The init from activations is Prefix Tuning's.
    """

    method: ClassVar[str] = "p_tuning_v2"
    kind: ClassVar[str] = "prefix"

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self._check_layers()

    def _check_layers(self) -> None:
        layers = self.layers
        listed = isinstance(layers, (tuple, list, range)) and len(layers) > 0
        if not listed or any(isinstance(i, bool) or not isinstance(i, int) for i in layers or ()):
            raise ArgumentError(f"layers is {layers!r}, expected None (all) or layer indices such as (0, 1, -1)")
        object.__setattr__(self, "layers", tuple(layers or ()))

    def prefix_layers(self, spec: BackboneSpec) -> tuple[int, ...]:
        super().prefix_layers(spec)
        return resolve_layers(self.layers, spec)
