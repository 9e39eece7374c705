"""Language modelling: the answer to a text, token by token, on a causal backbone or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastprompt.prompts.base import check_choice
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
from fastprompt.training.tasks.reading import TRUNCATE, cut, opening, text_of
from fastprompt.training.tasks.row_losses import shifted, token_losses


@dataclass(frozen=True)
class CausalLM(Task):
    """Says `target` after `text`, scored by how likely it is: one forward, nothing is generated.

    Semantics:
        examples have `text` (or the columns of the prompt's template) and `target`
        row = text ids + target ids + eos, the text with and the target without special tokens
        loss = -log p(token | everything before), summed over the target and eos
    The target follows the text directly: begin it with a space where words need one. `truncate` drops tokens at the
    "start" or "end" of a text that is too long; None: such a text is a problem.

    Scores: `log_likelihood` of a token (the negative loss), `token_accuracy`, and `sequence_accuracy`: the share of
    targets whose every token is the likeliest, which greedy generation would say.
    """

    truncate: str | None = None

    name: ClassVar[str] = "causal_lm"
    metric: ClassVar[str] = "log_likelihood"
    auto_class = "AutoModelForCausalLM"

    def __post_init__(self) -> None:
        check_choice("truncate", self.truncate, TRUNCATE)

    def columns(self, context: TaskContext) -> tuple[str, ...]:
        own = ("text",) if context.template is None else tuple(context.template.columns)
        return (*own, "target")

    def check_setup(self, context: TaskContext) -> list[str]:
        problems = []
        if context.tokenizer.eos_token_id is None:
            problems.append("the tokenizer has no eos token, which ends every target: set tokenizer.eos_token")
        if context.template is not None and context.template.has_mask:
            problems.append(f"{self.name} takes a template without [MASK]: the target follows the text")
        return problems

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        wanted = self._target(example, context)
        given = self._text(example, context, context.room(self._room_behind(wanted)))
        return (Features(given + wanted, [IGNORED] * len(given) + wanted),)

    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        return token_losses(*self._predicted(output, batch)).sum(1)

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        """Of each row the log-likelihood of its target, its tokens that are the likeliest, and its tokens."""
        logits, labels = self._predicted(output, batch)
        likelihood = -token_losses(logits, labels).sum(1)
        right = (logits.argmax(-1) == labels).sum(1)  # no token is IGNORED
        known = (labels != IGNORED).sum(1)
        return list(zip(likelihood.tolist(), right.tolist(), known.tolist(), strict=True))

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        return likelihood_scores([rows[0] for rows in predictions])

    def _room_behind(self, target: Sequence[int]) -> int:
        """Positions that a text must leave behind it."""
        return len(target)

    def _predicted(self, output: Any, batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[R, N', V]` and the labels `[R, N']` that they predict."""
        return shifted(output.logits, batch.padded_labels())

    def _target(self, example: Mapping[str, Any], context: TaskContext) -> list[int]:
        tokenizer = context.tokenizer
        return [*tokenizer(text_of(example, "target"), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _text(self, example: Mapping[str, Any], context: TaskContext, room: int | None) -> list[int]:
        """The ids before the target, at most `room` of them if cutting is allowed."""
        tokenizer, side = context.tokenizer, context.side(self.truncate)
        if context.template is not None:
            fields = {name: text_of(example, name) for name in context.template.columns}
            return context.template.encode(tokenizer, fields, None if side is None else room, side, closing=False)
        ids = list(tokenizer(text_of(example, "text", empty=True), add_special_tokens=False)["input_ids"])
        start = context.once(self, "opening", lambda: opening(tokenizer))
        if not start and not ids:
            start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
        if side is not None and room is not None and len(start) + len(ids) > room:
            if room <= len(start):
                raise ExampleError(self._no_room(context, room))
            ids = cut(ids, room - len(start), side)
        return start + ids

    def _no_room(self, context: TaskContext, room: int) -> str:
        if context.longest_text == room:
            return f"max_length is {room}, which the tokenizer's special tokens fill: raise it"
        return f"its target leaves no room for its text in {context.longest_row} positions"


def likelihood_scores(rows: Sequence[tuple[float, int, int]]) -> dict[str, float]:
    """Scores of `(log-likelihood, right tokens, tokens)` of many targets."""
    tokens = sum(count for _, _, count in rows)
    return {
        "log_likelihood": sum(likelihood for likelihood, _, _ in rows) / tokens,
        "token_accuracy": sum(right for _, right, _ in rows) / tokens,
        "sequence_accuracy": sum(right == count for _, right, count in rows) / len(rows),
    }
