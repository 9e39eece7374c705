"""Cartridge: raw trainable keys and values, up to thousands of tokens (Eyuboglu et al. 2025, arXiv 2506.06266)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import PromptConfig, check_int
from fastprompt.prompts.init import InitSource
from fastprompt.prompts.prefix import check_prefix_init, prefix_rows
from fastprompt.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class Cartridge(PromptConfig):
    """P keys and values for every layer, trained directly, the first `num_frozen_tokens` never changing.

    Semantics of `init`:
        "activations"   what the bare backbone computes for the first P tokens of `init_text`, repeated if shorter
        "random"        normal(0, init_std)
    A frozen first token stays an attention sink and keeps training stable. Source: the paper's
    parameterisation and initialisation, and PEFT's CARTRIDGE.
    """

    method: ClassVar[str] = "cartridge"
    kind: ClassVar[str] = "prefix"

    num_frozen_tokens: int = 1
    init: str = "random"
    init_text: str | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_frozen_tokens", self.num_frozen_tokens, 0)
        check_prefix_init(self.init, self.init_text, self.init_std)
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ArgumentError(
                f"num_frozen_tokens is {self.num_frozen_tokens}, expected at most "
                f"num_virtual_tokens={self.num_virtual_tokens}"
            )

    def _encoder(self, spec: BackboneSpec, source: InitSource | None) -> nn.Module:
        length, layers = self.num_virtual_tokens, self.prefix_layers(spec)
        return self._table(prefix_rows(self.init, self.init_text, self.init_std, length, spec, layers, source))

    def _table(self, weights: torch.Tensor) -> nn.Module:
        return FrozenFirst(weights, self.num_frozen_tokens)


class FrozenFirst(nn.Module):
    """Effective weights `[P, width]` whose first rows are a buffer and the rest a parameter."""

    frozen: torch.Tensor

    def __init__(self, weights: torch.Tensor, frozen: int) -> None:
        super().__init__()
        self.register_buffer("frozen", weights[:frozen].clone())
        self.weight = nn.Parameter(weights[frozen:].clone())

    def forward(self) -> torch.Tensor:
        return torch.cat([self.frozen, self.weight])
