"""P-Tuning v2: deep prompts for all or chosen layers (Liu et al. 2021, arXiv 2110.07602)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import PromptConfig, Table, check_float, resolve_layers
from fastprompt.prompts.init import InitSource
from fastprompt.prompts.prefix_tuning import PrefixMLP, check_prefix_init, check_reparameterization
from fastprompt.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PromptConfig):
    """P keys and values for the chosen layers, optionally computed by an MLP while training.

    Semantics:
        layers=None                all layers; else indices, negative ones from the end: (-1, -2) is the top two
        reparameterization=None    a table [P, width] drawn from normal(0, init_std)
        reparameterization="mlp"   Embedding(P, embed_size) -> Linear(hidden_size) -> Tanh -> Linear(width)
        dropout                    on the keys and values while training
    `embed_size` None is the backbone's hidden size. Source: the paper's prompt optimisation and its study
    of prompt depth (chosen layers), and the authors' prefix encoder.
    """

    method: ClassVar[str] = "p_tuning_v2"
    kind: ClassVar[str] = "prefix"

    layers: tuple[int, ...] | None = None
    reparameterization: str | None = None
    hidden_size: int = 512
    embed_size: int | None = None
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reparameterization(self.reparameterization, self.hidden_size, self.embed_size)
        check_float("dropout", self.dropout, 0.0, 1.0)
        check_prefix_init("random", None, self.init_std)
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

    def _encoder(self, spec: BackboneSpec, source: InitSource | None) -> nn.Module:
        length, width = self.num_virtual_tokens, self.width(spec)
        if self.reparameterization == "mlp":
            return PrefixMLP(length, self.embed_size or spec.hidden_size, self.hidden_size, width)
        return Table(torch.randn(length, width) * self.init_std)
