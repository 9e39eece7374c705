"""What prompt inits read from a backbone and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from fastprompt.errors import ArgumentError
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.spec import Prefix


class BackboneSource:
    """A backbone as `fastprompt.prompts.InitSource`."""

    def __init__(self, backbone: Backbone, tokenizer: Any = None) -> None:
        self._backbone = backbone
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        return self._backbone.spec.vocab_size

    def tokenize(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ArgumentError("an init from text needs a tokenizer: PromptedModel(backbone, tokenizer)")
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._backbone.model.get_input_embeddings()
        return table(ids.to(self._backbone.device)).float().cpu()

    def activations(self, ids: torch.Tensor) -> Prefix:
        return self._backbone.activations(ids).map(lambda t: t.float().cpu())
