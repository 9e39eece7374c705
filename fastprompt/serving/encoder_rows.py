"""Rows of an encoder: one forward for any mixture of prompts, heads and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.model import PromptedModel
from fastprompt.prompts.base import check_choice
from fastprompt.serving.request import RowFailedError

POOLINGS = ("mean", "cls", "last")
_TASKS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}


@dataclass(frozen=True)
class Pooling:
    """How a text's hidden states become one vector: their mean, the first or the last one; scaled to length 1."""

    kind: str = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        check_choice("pooling", self.kind, POOLINGS)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[E]` float32 of a text's hidden states `[N, E]`."""
        hidden = hidden.float()
        pooled = {"mean": lambda: hidden.mean(0), "cls": lambda: hidden[0], "last": lambda: hidden[-1]}[self.kind]()
        return torch.nn.functional.normalize(pooled, dim=0) if self.normalize else pooled


MEAN = Pooling()


@dataclass(frozen=True)
class EncoderRow:
    """A text's token ids, the prompt it runs under (a name in the model's library), and what is asked of it.

    `pooling` asks for an embedding `[E]`; without it the answer is the first `outputs` logits, `[C]` or, of a token
    classifier, `[N, C]`.
    """

    ids: Sequence[int]
    prompt: str | None
    outputs: int
    pooling: Pooling | None = None


def task_of(model: PromptedModel) -> str:
    """What a backbone answers with: "sequence" or "token" logits, or "embedding"s only."""
    backbone, info = model.backbone, model._info
    if info.encoder_decoder:
        raise UnsupportedError(f"{info.spec.describe()} is an encoder-decoder: serve an encoder or a decoder")
    if task := _TASKS.get(info.task_type or ""):
        return task
    if backbone.base_model is backbone:
        return "embedding"
    raise UnsupportedError(
        f"{type(backbone).__name__} is neither a sequence nor a token classifier nor a body without a head: load it "
        "with AutoModelForSequenceClassification, AutoModelForTokenClassification or AutoModel"
    )


class RowRunner:
    """Answers rows with arrays, or with the exception that says why not; called on the thread that runs torch."""

    def __init__(self, model: PromptedModel) -> None:
        self._model = model.eval()
        config = model.backbone.config
        if task_of(model) == "sequence" and model._info.looks_up_ids and config.pad_token_id is None:
            raise ArgumentError(
                f"{type(model.backbone).__name__} finds the end of a text by config.pad_token_id, which is not set: "
                "set it to the tokenizer's padding token"
            )
        self._pad = config.pad_token_id or 0
        self.some_id = 0 if self._pad else 1  # of a token that is not padding

    def __call__(self, rows: Sequence[EncoderRow]) -> list[np.ndarray | Exception]:
        """Answers in the order of `rows`. A batch that fails is halved until what fails stands alone."""
        try:
            answers = self._forward(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error]
            middle = len(rows) // 2
            return [*self(rows[:middle]), *self(rows[middle:])]
        return [self._checked(answer, row, len(rows)) for answer, row in zip(answers, rows, strict=True)]

    def _checked(self, answer: np.ndarray, row: EncoderRow, neighbours: int) -> np.ndarray | Exception:
        """The answer, or an error for one that is not finite by itself, without any neighbours."""
        if np.isfinite(answer).all():
            return answer
        if neighbours > 1:
            return self([row])[0]
        culprit = f"prompt {row.prompt.rsplit('@', 1)[0]!r}" if row.prompt else "the backbone"
        return RowFailedError(f"{culprit} answers this text with numbers that are not finite: train or store it anew")

    @torch.no_grad()
    def _forward(self, rows: Sequence[EncoderRow]) -> list[np.ndarray]:
        width = max(len(row.ids) for row in rows)
        device = self._model.backbone.device
        ids = torch.tensor([[*row.ids, *[self._pad] * (width - len(row.ids))] for row in rows], device=device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        asked = {"output_hidden_states": True} if any(row.pooling for row in rows) else {}
        output = self._model(ids, mask, prompts=[row.prompt for row in rows], **asked)
        return self._answers(rows, output)

    def _answers(self, rows: Sequence[EncoderRow], output: Any) -> list[np.ndarray]:
        logits: Any = output.get("logits")
        logits = logits.float().cpu() if logits is not None else None
        hidden: Any = output.get("last_hidden_state")
        if hidden is None and output.get("hidden_states") is not None:
            hidden = output["hidden_states"][-1]
        pooled = {i: row.pooling(hidden[i, : len(row.ids)]) for i, row in enumerate(rows) if row.pooling}
        vectors = dict(zip(pooled, torch.stack([*pooled.values()]).cpu(), strict=True)) if pooled else {}
        return [(vectors[i] if row.pooling else _own(logits[i], row)).numpy().copy() for i, row in enumerate(rows)]


def _own(logits: torch.Tensor, row: EncoderRow) -> torch.Tensor:
    """A row's own part of the batch's logits `[C]` or `[N, C]`."""
    return (logits if logits.dim() == 1 else logits[: len(row.ids)])[..., : row.outputs]
