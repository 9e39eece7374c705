"""Prefix Tuning: trained keys and values in every layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import PromptConfig, Table, check_choice, check_float, check_int, check_text
from fastprompt.prompts.init import InitSource, activation_rows, need_source
from fastprompt.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PromptConfig):
    """P keys and values for every layer, optionally computed by an MLP while training.

    Semantics:
        reparameterization=None    a table [P, width]
        reparameterization="mlp"   Embedding(P, embed_size) -> Linear(hidden_size) -> Tanh -> Linear(width)
        init="random"              table: normal(0, init_std); MLP: torch's own init
        init="activations"         table: what the bare backbone computes for `init_text`, repeated or cut to P
        dropout                    on the keys and values while training
    `embed_size` None is the backbone's hidden size. Source: section 4 and, for the init, section 7.4.
    """

    method: ClassVar[str] = "prefix_tuning"
    kind: ClassVar[str] = "prefix"

    reparameterization: str | None = None
    hidden_size: int = 512
    embed_size: int | None = None
    dropout: float = 0.0
    init: str = "random"
    init_text: str | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reparameterization(self.reparameterization, self.hidden_size, self.embed_size)
        check_float("dropout", self.dropout, 0.0, 1.0)
        check_prefix_init(self.init, self.init_text, self.init_std)
        if self.init == "activations" and self.reparameterization is not None:
            raise ArgumentError(
                'init="activations" sets keys and values directly but reparameterization is "mlp": '
                "use reparameterization=None"
            )

    def _encoder(self, spec: BackboneSpec, source: InitSource | None) -> nn.Module:
        if self.reparameterization == "mlp":
            return PrefixMLP(
                self.num_virtual_tokens, self.embed_size or spec.hidden_size, self.hidden_size, self.width(spec)
            )
        return Table(prefix_rows(self.init, self.init_text, self.init_std, self.num_virtual_tokens, spec, source))


class PrefixMLP(nn.Module):
    """Embedding(P, H) -> Linear(H, hidden) -> Tanh -> Linear(hidden, width)."""

    def __init__(self, length: int, embed: int, hidden: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, embed)
        self.mlp = nn.Sequential(nn.Linear(embed, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self) -> torch.Tensor:
        return self.mlp(self.positions.weight)


def check_reparameterization(kind: object, hidden_size: object, embed_size: object) -> None:
    """Raise unless these describe a reparameterisation, or none."""
    check_choice("reparameterization", kind, (None, "mlp"))
    check_int("hidden_size", hidden_size, 1)
    if embed_size is not None:
        check_int("embed_size", embed_size, 1)


def check_prefix_init(init: object, text: object, std: object) -> None:
    """Raise unless these describe an init of keys and values."""
    check_choice("init", init, ("random", "activations"))
    check_text("init_text", text, needed_by='init="activations"' if init == "activations" else None)
    check_float("init_std", std, 0.0, math.inf)


def prefix_rows(
    init: str, text: str | None, std: float, length: int, spec: BackboneSpec, source: InitSource | None
) -> torch.Tensor:
    """Flat `[length, width]` keys and values over all layers: activations of `text`, or normal(0, std)."""
    if init == "activations":
        return activation_rows(need_source(source, init), text or "", length, spec)
    return torch.randn(length, sum(layer.width for layer in spec.layers)) * std
