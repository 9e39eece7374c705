"""What Prefix Tuning and P-Tuning v2 share: a prefix from a table or an MLP, and how it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastprompt.prompts.base import PromptConfig, Table, check_choice, check_float, check_text
from fastprompt.prompts.init import InitSource, activation_rows, need_source
from fastprompt.prompts.reparameterization import MLPShape, checked_kind, prefix_mlp
from fastprompt.spec import BackboneSpec, flat_width


@dataclass(frozen=True, kw_only=True)
class TrainedPrefix(PromptConfig):
    """P keys and values for each of `prefix_layers`, optionally computed by an MLP while training."""

    reparameterization: str | None = None
    hidden_size: int = 512
    embed_size: int | None = None
    hidden_layers: int = 1
    dropout: float = 0.0
    init: str = "random"
    init_text: str | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = checked_kind(self.reparameterization, self.hidden_size, self.embed_size, self.hidden_layers)
        object.__setattr__(self, "reparameterization", kind)
        check_float("dropout", self.dropout, 0.0, 1.0)
        check_prefix_init(self.init, self.init_text, self.init_std)

    def _encoder(self, spec: BackboneSpec, source: InitSource | None) -> nn.Module:
        length, sites = self.num_virtual_tokens, self.prefix_layers(spec)
        if self.reparameterization is None:
            return Table(prefix_rows(self.init, self.init_text, self.init_std, length, spec, sites, source))
        shape = MLPShape(self.embed_size or spec.hidden_size, self.hidden_size, self.hidden_layers)
        mlp = prefix_mlp(length, shape, spec, sites)
        if self.init == "activations":
            mlp.start_from(prefix_rows(self.init, self.init_text, self.init_std, length, spec, sites, source))
        return mlp


def check_prefix_init(init: object, text: object, std: object) -> None:
    """Raise unless these describe an init of keys and values."""
    check_choice("init", init, ("random", "activations"))
    check_text("init_text", text, needed_by='init="activations"' if init == "activations" else None)
    check_float("init_std", std, 0.0, math.inf)


def prefix_rows(
    init: str,
    text: str | None,
    std: float,
    length: int,
    spec: BackboneSpec,
    sites: Sequence[int],
    source: InitSource | None,
) -> torch.Tensor:
    """Flat `[length, width]` keys and values over `sites`: activations of `text`, or normal(0, std)."""
    if init == "activations":
        return activation_rows(need_source(source, init), text or "", length, spec, sites)
    return torch.randn(length, flat_width(spec, sites)) * std
