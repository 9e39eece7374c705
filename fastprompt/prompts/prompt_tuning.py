"""Prompt Tuning: trained embeddings in front of the input (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import PromptConfig, Table, check_choice, check_int, check_text
from fastprompt.prompts.init import InitSource, label_rows, need_source, sampled_rows, text_ids, token_rows
from fastprompt.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptConfig):
    """P virtual-token embeddings `[P, E]`, trained directly.

    Semantics of `init` (paper, section 3.2):
        "random"   uniform(-0.5, 0.5)
        "vocab"    embeddings of tokens drawn from the first `vocab_top` ids
        "text"     embeddings of `init_text`'s tokens, repeated or cut to P
        "labels"   for each of `init_labels` the mean of its sub-pieces' embeddings, then "vocab" for the rest
    """

    method: ClassVar[str] = "prompt_tuning"
    kind: ClassVar[str] = "embedding"

    init: str = "random"
    init_text: str | None = None
    init_labels: tuple[str, ...] | None = None
    vocab_top: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("random", "vocab", "text", "labels"))
        check_int("vocab_top", self.vocab_top, 1)
        check_text("init_text", self.init_text, needed_by='init="text"' if self.init == "text" else None)
        if self.init_labels is not None or self.init == "labels":
            self._check_labels()

    def _check_labels(self) -> None:
        labels = self.init_labels
        if isinstance(labels, str) or not labels:
            raise ArgumentError(f'init_labels is {labels!r}, expected the class names, e.g. ("positive", "negative")')
        for label in labels:
            check_text("init_labels", label, needed_by='init="labels"')
        if len(labels) > self.num_virtual_tokens:
            raise ArgumentError(
                f"init_labels has {len(labels)} names for num_virtual_tokens={self.num_virtual_tokens}: each takes "
                f"one virtual token, so use num_virtual_tokens >= {len(labels)} or another init"
            )
        object.__setattr__(self, "init_labels", tuple(labels))

    def _encoder(self, spec: BackboneSpec, source: InitSource | None) -> nn.Module:
        return Table(self._rows(spec, source))

    def _rows(self, spec: BackboneSpec, source: InitSource | None) -> torch.Tensor:
        count = self.num_virtual_tokens
        if self.init == "random":
            return torch.rand(count, spec.hidden_size) - 0.5
        source = need_source(source, self.init)
        if self.init == "text":
            return token_rows(source, text_ids(source, self.init_text or "", count), spec)
        if self.init == "labels":
            return label_rows(source, self.init_labels or (), count, self.vocab_top, spec)
        return sampled_rows(source, count, self.vocab_top, spec)
