"""Extractive question answering: the answer is a piece of the context, which may be longer than the backbone reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import check_int
from fastprompt.training import metrics
from fastprompt.training.tasks.base import ExampleError, Examples, Features, Item, Task, TaskBatch, TaskContext
from fastprompt.training.tasks.reading import text_of


@dataclass(frozen=True)
class Window:
    """Labels of one row: the question and a window of the context.

    `start` and `end` are the answer's first and last token, both `null` where it is not (wholly) in this window;
    `offsets[i]` are the characters of the context that token `first + i` covers.
    """

    start: int
    end: int
    null: int
    first: int
    offsets: tuple[tuple[int, int], ...] = field(repr=False)


@dataclass(frozen=True)
class Spans:
    """What a row predicts: the score of "no answer here", and of the best `(score, first, last + 1)` in characters."""

    null: float
    best: tuple[tuple[float, int, int], ...]


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Which characters of a context answer a question, told by a linear head of the prompt's own.

    Semantics:
        examples have `question`, `context`, and `answers` as SQuAD: {"text": [...], "answer_start": [...]}
        rows = windows of `window` tokens, `stride` of which neighbours share
        loss = (-log softmax(start_logits)[start] - log softmax(end_logits)[end]) / 2 over a row's tokens
        prediction = the best start + end of all windows, at most `max_answer` tokens apart
    Args:
        no_answer: whether questions may have no answer (SQuAD 2); the first token stands for it.
        n_best: spans a row keeps.
    """

    window: int = 384
    stride: int = 128
    max_answer: int = 30
    n_best: int = 20
    no_answer: bool = False

    name: ClassVar[str] = "question_answering"
    metric: ClassVar[str] = "f1"
    auto_class = "AutoModelForQuestionAnswering"

    def __post_init__(self) -> None:
        for name, low in (("window", 8), ("stride", 0), ("max_answer", 1), ("n_best", 1)):
            check_int(name, getattr(self, name), low)
        if self.stride >= self.window:
            raise ArgumentError(f"stride is {self.stride}, expected less than the window of {self.window} tokens")

    def num_labels(self) -> int:
        return 2

    def columns(self, context: TaskContext) -> tuple[str, ...]:
        return ("question", "context", "answers")

    def check_setup(self, context: TaskContext) -> list[str]:
        problems = super().check_setup(context)
        if not getattr(context.tokenizer, "is_fast", False):
            problems.append("question_answering needs a fast tokenizer, which knows the characters of its tokens")
        return problems

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        question, text = text_of(example, "question").strip(), text_of(example, "context")
        spans = _answers(example, text)
        if not spans and not self.no_answer:
            raise ExampleError("it has no answers, which no_answer=True would allow")
        encoded = self._windows(question, text, context)
        rows = []
        for i, ids in enumerate(encoded["input_ids"]):
            types = encoded["token_type_ids"][i] if "token_type_ids" in encoded else None
            labels = _window(encoded, i, context.tokenizer.cls_token_id, spans[0] if spans else None)
            if not labels.offsets:
                raise ExampleError("its context has no tokens")
            rows.append(Features(list(ids), labels, types))
        return tuple(rows)

    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        parts = []
        for logits, side in ((output.start_logits, "start"), (output.end_logits, "end")):
            own = logits.float().masked_fill(batch.attention_mask == 0, float("-inf"))  # no row sees its neighbours'
            wanted = batch.tensor([getattr(window, side) for window in batch.labels])
            parts.append(cross_entropy(own, wanted, reduction="none"))
        return (parts[0] + parts[1]) / 2

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        starts, ends = (t.float().cpu().numpy() for t in (output.start_logits, output.end_logits))
        return [self._spans(*row) for row in zip(starts, ends, batch.labels, strict=True)]

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        guesses, truth = [], []
        for rows, item in zip(predictions, items, strict=True):
            example = examples[item.example]
            guesses.append(self.answer(rows, example["context"]))
            truth.append([example["context"][a:b] for a, b in _answers(example, example["context"])])
        return metrics.answers(guesses, truth)

    def answer(self, rows: Sequence[Spans], context: str) -> str:
        """The text that the rows of one example answer with; "" for no answer."""
        best = max((span for row in rows for span in row.best), default=None)
        if best is None or (self.no_answer and min(row.null for row in rows) > best[0]):
            return ""
        return context[best[1] : best[2]].strip()

    def _windows(self, question: str, text: str, context: TaskContext) -> Any:
        tokenizer = context.tokenizer
        if tokenizer.sep_token_id is None:
            question += "\n"  # nothing else would part the two
        limit = context.room()
        room = self.window if limit is None else min(self.window, limit)
        used = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        used += tokenizer.num_special_tokens_to_add(pair=True)
        if used + self.stride >= room:
            raise ExampleError(
                f"its question of {used} tokens and a stride of {self.stride} leave no room for the context in "
                f"{room} tokens: shorten the question or the stride"
            )
        return tokenizer(
            question,
            text,
            truncation="only_second",
            max_length=room,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def _spans(self, start: np.ndarray, end: np.ndarray, labels: Window) -> Spans:
        """The best spans among all that begin and end in the context and are no longer than allowed."""
        count = len(labels.offsets)
        own = slice(labels.first, labels.first + count)
        ahead = np.concatenate([end[own], np.full(self.max_answer - 1, -np.inf, end.dtype)])
        scores = start[own, None] + np.lib.stride_tricks.sliding_window_view(ahead, self.max_answer)
        order = np.argsort(-scores, axis=None, kind="stable")[: self.n_best]
        best = []
        for first, more in zip(*np.unravel_index(order, scores.shape), strict=True):
            if np.isfinite(scores[first, more]):
                chars = labels.offsets[first][0], labels.offsets[first + more][1]
                best.append((float(scores[first, more]), *chars))
        return Spans(float(start[labels.null] + end[labels.null]), tuple(best))


def _answers(example: Mapping[str, Any], context: str) -> list[tuple[int, int]]:
    """The answers of an example as `(first, last + 1)` characters of its context."""
    given = example.get("answers")
    if isinstance(given, Mapping) and {"text", "answer_start"} <= set(given):
        pairs = list(zip(given["text"], given["answer_start"], strict=False))
    elif isinstance(given, list) and all(isinstance(a, Mapping) and {"text", "answer_start"} <= set(a) for a in given):
        pairs = [(a["text"], a["answer_start"]) for a in given]
    else:
        raise ExampleError('answers is no {"text": [...], "answer_start": [...]}')
    for text, start in pairs:
        if not text or context[start : start + len(text)] != text:
            came = context[start : start + len(text)]
            raise ExampleError(f"the answer {text!r} is not at answer_start {start} of its context, {came!r} is")
    return [(start, start + len(text)) for text, start in pairs]


def _window(encoded: Any, index: int, cls_id: int | None, answer: tuple[int, int] | None) -> Window:
    """Labels of the `index`-th row of a tokenised question."""
    ids = encoded["input_ids"][index]
    places = [i for i, side in enumerate(encoded.sequence_ids(index)) if side == 1]
    offsets = tuple(tuple(encoded["offset_mapping"][index][i]) for i in places)
    null = ids.index(cls_id) if cls_id in ids else 0
    first = places[0] if places else 0
    start = end = null
    if answer and offsets and offsets[0][0] <= answer[0] and answer[1] <= offsets[-1][1]:
        start = first + next(i for i, (_, stop) in enumerate(offsets) if stop > answer[0])
        end = first + max(i for i, (begin, _) in enumerate(offsets) if begin < answer[1])
    return Window(start, end, null, first, offsets)
