"""Token classification: a tag for each word, learned at its first sub-word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastprompt.prompts.base import check_choice
from fastprompt.training import metrics
from fastprompt.training.tasks.base import (
    IGNORED,
    ExampleError,
    Examples,
    Features,
    Item,
    Task,
    TaskBatch,
    TaskContext,
)
from fastprompt.training.tasks.reading import check_classes, class_index
from fastprompt.training.tasks.row_losses import token_losses


@dataclass(frozen=True)
class TokenClassification(Task):
    """A tag of `classes` for each word, told by a linear head of the prompt's own.

    Semantics:
        examples have `tokens` (the words, a list) and `tags` (a class's name or index for each)
        loss = -log softmax(logits)[tag] at the first sub-word of each word, summed; other sub-words have none
    With truncate="end" the last words of a text that is too long are dropped and count as the first class ("O") in
    scores; None: such a text is a problem. Scores are seqeval's of entities, so name classes "O", "B-x", "I-x".
    """

    classes: tuple[str, ...]
    truncate: str | None = None

    name: ClassVar[str] = "token_classification"
    metric: ClassVar[str] = "f1"
    auto_class = "AutoModelForTokenClassification"

    def __post_init__(self) -> None:
        check_classes(self.classes)
        check_choice("truncate", self.truncate, (None, "end"))

    def num_labels(self) -> int:
        return len(self.classes)

    def labels(self) -> tuple[str, ...]:
        return self.classes

    def packages(self) -> tuple[str, ...]:
        return ("seqeval",)

    def columns(self, context: TaskContext) -> tuple[str, ...]:
        return ("tokens", "tags")

    def check_setup(self, context: TaskContext) -> list[str]:
        problems = super().check_setup(context)
        if not getattr(context.tokenizer, "is_fast", False):
            problems.append("token_classification needs a fast tokenizer, which knows the words of its tokens")
        return problems

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        words, tags = self._words(example), self._tags(example)
        if len(words) != len(tags):
            raise ExampleError(f"it has {len(words)} tokens and {len(tags)} tags, expected as many")
        space = context.once(self, "space", lambda: _space(context.tokenizer))
        encoded = context.tokenizer([words[0], *(space + word for word in words[1:])], is_split_into_words=True)
        owners = encoded.word_ids()
        if without := sorted(set(range(len(words))) - set(owners)):
            raise ExampleError(f"word {without[0]}, {words[without[0]]!r}, has no tokens: remove it with its tag")
        labels, before = [], None
        for owner in owners:
            labels.append(IGNORED if owner is None or owner == before else tags[owner])
            before = owner
        ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids")
        keep: Sequence[int] = range(len(ids))
        room = None if context.side(self.truncate) is None else context.room()
        if room is not None and len(ids) > room:
            keep = _kept(owners, room)
            if all(labels[i] == IGNORED for i in keep):
                raise ExampleError(f"{room} tokens leave no room for its first word")
        types = None if types is None else [types[i] for i in keep]
        return (Features([ids[i] for i in keep], [labels[i] for i in keep], types),)

    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        return token_losses(output.logits[..., : len(self.classes)], batch.padded_labels()).sum(1)

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        labelled = (batch.padded_labels() != IGNORED).tolist()
        best = output.logits[..., : len(self.classes)].argmax(-1).tolist()
        return [[tag for tag, there in zip(*row, strict=True) if there] for row in zip(best, labelled, strict=True)]

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        guesses, truth = [], []
        for (row,), item in zip(predictions, items, strict=True):
            tags = self._tags(examples[item.example])
            guesses.append([self.classes[tag] for tag in [*row, *[0] * (len(tags) - len(row))]])
            truth.append([self.classes[tag] for tag in tags])
        return metrics.entities(guesses, truth)

    def _words(self, example: Mapping[str, Any]) -> list[str]:
        words = example.get("tokens")
        if not isinstance(words, (list, tuple)) or not words or not all(isinstance(w, str) for w in words):
            raise ExampleError(f"tokens is {_short(words)}, expected a list of words")
        return list(words)

    def _tags(self, example: Mapping[str, Any]) -> list[int]:
        tags = example.get("tags")
        if not isinstance(tags, (list, tuple)):
            raise ExampleError(f"tags is {_short(tags)}, expected a list of one a word")
        return [class_index(tag, "tags", self.classes) for tag in tags]


def _space(tokenizer: Any) -> str:
    """A space where the tokenizer would else take split words for pieces of one word."""
    joined, split = tokenizer("a a")["input_ids"], tokenizer(["a", "a"], is_split_into_words=True)["input_ids"]
    return "" if joined == split else " "


def _kept(owners: Sequence[int | None], room: int) -> list[int]:
    """Places of the first tokens and of all special ones, `room` together."""
    words = room - sum(owner is None for owner in owners)
    seen = 0
    keep = []
    for place, owner in enumerate(owners):
        seen += owner is not None
        if owner is None or seen <= words:
            keep.append(place)
    return keep


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
