"""Sequence classification with a linear head: one class for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from fastprompt.prompts.base import check_choice
from fastprompt.training import metrics
from fastprompt.training.tasks.base import ExampleError, Examples, Features, Item, Task, TaskBatch, TaskContext
from fastprompt.training.tasks.reading import TRUNCATE, check_classes, class_of, text_of


@dataclass(frozen=True)
class SequenceClassification(Task):
    """Which of `classes` a text belongs to, told by a linear head of the prompt's own.

    Semantics:
        examples have `text`, `label` (a class's name or index), and `text_pair` where pairs=True
        loss = -log softmax(logits)[label], a row
    `truncate` says which end of a text that is too long is dropped; None: such a text is a problem.
    """

    classes: tuple[str, ...]
    pairs: bool = False
    truncate: str | None = None

    name: ClassVar[str] = "sequence_classification"
    metric: ClassVar[str] = "accuracy"
    auto_class = "AutoModelForSequenceClassification"

    def __post_init__(self) -> None:
        check_classes(self.classes)
        check_choice("truncate", self.truncate, TRUNCATE)

    def num_labels(self) -> int:
        return len(self.classes)

    def labels(self) -> tuple[str, ...]:
        return self.classes

    def packages(self) -> tuple[str, ...]:
        return ("sklearn",)

    def columns(self, context: TaskContext) -> tuple[str, ...]:
        return ("text", *(["text_pair"] if self.pairs else []), "label")

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        label = class_of(example, "label", self.classes)
        texts = [text_of(example, column) for column in self.columns(context)[:-1]]
        return (tokenized(context, texts, label, self.truncate),)

    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        logits = output.logits[:, : len(self.classes)]  # a neighbour's head may have more
        return cross_entropy(logits.float(), batch.tensor(batch.labels), reduction="none")

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        return output.logits[:, : len(self.classes)].argmax(-1).tolist()

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        truth = [item.rows[0].labels for item in items]
        return metrics.classification([p[0] for p in predictions], truth, len(self.classes))


def tokenized(context: TaskContext, texts: Sequence[str], labels: Any, truncate: str | None) -> Features:
    """A row of one text or a pair, with the tokenizer's special tokens; cut to the room there is, if asked."""
    tokenizer, side, room = context.tokenizer, context.side(truncate), context.room()
    encoded = tokenizer(*texts)
    if side is not None and room is not None and len(encoded["input_ids"]) > room:
        least = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1) + len(texts)
        if room < least:
            raise ExampleError(f"{room} tokens leave no room for its text, which needs {least} at least")
        before = tokenizer.truncation_side
        try:
            tokenizer.truncation_side = "right" if side == "end" else "left"
            encoded = tokenizer(*texts, truncation=True, max_length=room)
        finally:
            tokenizer.truncation_side = before
    return Features(list(encoded["input_ids"]), labels, encoded.get("token_type_ids"))
