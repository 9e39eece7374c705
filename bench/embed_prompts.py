"""Virtual tokens in front of text embeddings: ours, and the ways it is written in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.attention_baselines import Entry
from bench.ceilings import Work
from bench.op_cases import Inputs, OpCase
from fastprompt.ops import embed_prompts


@dataclass(frozen=True)
class EmbedCase(OpCase):
    """`rows` of `tokens` tokens, each under one of so many `prompts` of `virtual` tokens, unequal ones if `ragged`."""

    op = "embed_prompts"
    rows: int
    prompts: int
    virtual: int
    tokens: int
    hidden: int = 1024
    vocabulary: int = 8000
    ragged: bool = False

    @property
    def name(self) -> str:
        words = f"embed B{self.rows} prompts{self.prompts} P{self.virtual} N{self.tokens} E{self.hidden}"
        return words + (" ragged" if self.ragged else "")

    def shrunk(self) -> EmbedCase:
        return replace(self, rows=4, prompts=min(self.prompts, 3), virtual=5, tokens=7, hidden=16, vocabulary=50)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        gen = torch.Generator().manual_seed(0)
        prompts, start = torch.randn(sum(self._lengths()), self.hidden, generator=gen).to(dtype), self._starts()
        return {
            "weight": torch.randn(self.vocabulary, self.hidden, generator=gen).to(dtype),
            "ids": torch.randint(0, self.vocabulary, (self.rows, self.tokens), generator=gen),
            "prompts": prompts,
            "start": torch.tensor([start[t] for t in self._prompt_of()], dtype=torch.int32),
            "length": torch.tensor([self._lengths()[t] for t in self._prompt_of()], dtype=torch.int32),
        }

    def copy(self, x: Inputs) -> Inputs:
        """The table of embeddings is the backbone's, which there is once."""
        return super().copy(x) | {"weight": x["weight"]}

    def ours(self, impl: str) -> Entry:
        def build(x: Inputs) -> Callable[[], Tensor]:
            return lambda: embed_prompts(
                x["ids"], x["weight"], x["prompts"], x["start"], x["length"], out_len=self.virtual + self.tokens,
                impl=impl,
            )  # fmt: skip

        return Entry(f"impl {impl}", build, _named)

    def baselines(self) -> dict[str, Entry]:
        found = {"scattered": Entry("text and prompts copied to places known before", self._scattered, _named)}
        if not self.ragged:
            found["concatenated"] = Entry("prompts gathered by row, concatenated", self._concatenated, _named)
        return found | {"by row": Entry("concatenated row by row, padded", self._by_row, _named)}

    def work(self, x: Inputs) -> Work:
        """Rows of the tables that are read, each once, and what is written."""
        size = self.hidden * x["weight"].element_size()
        written = self.rows * (self.virtual + self.tokens)
        return Work(0.0, (x["ids"].unique().numel() + len(x["prompts"]) + written) * size + x["ids"].numel() * 8)

    def _lengths(self) -> list[int]:
        spread = max(self.virtual // 2, 1) if self.ragged else 1
        return [self.virtual - t * 37 % spread for t in range(self.prompts)]

    def _starts(self) -> list[int]:
        return [sum(self._lengths()[:t]) for t in range(self.prompts)]

    def _prompt_of(self) -> list[int]:
        return [b * 7 % self.prompts for b in range(self.rows)]

    def _scattered(self, x: Inputs) -> Callable[[], Tensor]:
        total = self.virtual + self.tokens
        extents = list(zip(x["start"].tolist(), x["length"].tolist(), strict=True))
        text_to = torch.tensor([b * total + n + i for b, (_, n) in enumerate(extents) for i in range(self.tokens)])
        virtual_to = torch.tensor([b * total + i for b, (_, n) in enumerate(extents) for i in range(n)])
        virtual_from = torch.tensor([s + i for s, n in extents for i in range(n)])
        ids = x["ids"].flatten()

        def run() -> Tensor:
            make = torch.zeros if self.ragged else torch.empty
            out = make(self.rows * total, self.hidden, dtype=x["weight"].dtype)
            out.index_copy_(0, text_to, F.embedding(ids, x["weight"]))
            out.index_copy_(0, virtual_to, x["prompts"].index_select(0, virtual_from))
            return out.view(self.rows, total, self.hidden)

        return run

    def _concatenated(self, x: Inputs) -> Callable[[], Tensor]:
        bank = x["prompts"].view(self.prompts, self.virtual, self.hidden)
        rows = torch.tensor(self._prompt_of())

        def run() -> Tensor:
            virtual = bank.expand(self.rows, -1, -1) if self.prompts == 1 else bank.index_select(0, rows)
            return torch.cat([virtual, F.embedding(x["ids"], x["weight"])], 1)

        return run

    def _by_row(self, x: Inputs) -> Callable[[], Tensor]:
        extents = list(zip(x["start"].tolist(), x["length"].tolist(), strict=True))

        def run() -> Tensor:
            text = F.embedding(x["ids"], x["weight"])
            rows = [torch.cat([x["prompts"][s : s + n], row]) for (s, n), row in zip(extents, text, strict=True)]
            return pad_sequence(rows, batch_first=True)

        return run


def _named(result: Any) -> dict[str, Tensor]:
    return {"out": result}


CASES = (EmbedCase(32, 32, 16, 32), EmbedCase(8, 1, 64, 128), EmbedCase(32, 8, 64, 64, ragged=True))
