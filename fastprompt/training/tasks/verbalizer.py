"""Classification by words: a language model says which of the classes' words fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import check_choice
from fastprompt.training import metrics
from fastprompt.training.tasks import pattern as patterns
from fastprompt.training.tasks.base import IGNORED, Examples, Features, Item, Task, TaskBatch, TaskContext
from fastprompt.training.tasks.competition import by_item, first_rows
from fastprompt.training.tasks.pattern import word_ids, word_problems
from fastprompt.training.tasks.reading import TRUNCATE, check_classes, class_of
from fastprompt.training.tasks.row_losses import shifted, token_losses


@dataclass(frozen=True)
class Said:
    """Labels of one row: the right class, and the words that may answer.

    Either `place` is the token whose logits answer for all words, each of one token, and `words` are their ids; or
    (`place` None) the row ends with one of the words, the row's `said` tokens.
    """

    label: int
    place: int | None
    said: int
    words: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Verbalizer(Task):
    """Which class an example belongs to, told by a word that a language model says; nothing but the prompt is trained.

    Semantics:
        examples have the columns of `pattern`'s slots (or of the prompt's template) and `label`, a class's name or
        index
        score(word) = its logit at [MASK]; or, where words have several tokens, the mean of their log-probabilities
        score(class) = mean of its words' scores;  loss = -log softmax(scores)[label]
    On a causal backbone the [MASK] ends the pattern and is not read.

    Args:
        words: class -> its word, or several.
        pattern: a text with slots and one [MASK], for prompts without a template.
        masked: whether the backbone is a masked language model, whose words must have one token.
        truncate: which end of a text that is too long is dropped; None: such a text is a problem.

    Source: Schick & Schuetze 2021 (arXiv 2001.07676); Liu et al. 2021 (arXiv 2103.10385).
    """

    words: dict[str, str | tuple[str, ...]] = field(hash=False)
    pattern: str = "{text} [MASK]"
    masked: bool = False
    truncate: str | None = None

    name: ClassVar[str] = "verbalizer"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if not isinstance(self.words, Mapping) or not all(map(_as_words, self.words.values())):
            raise ArgumentError(f"words is {self.words!r}, expected a word, or several, for each class")
        check_classes(tuple(self.words))
        patterns.check_pattern(self.pattern)
        check_choice("truncate", self.truncate, TRUNCATE)

    @property
    def auto_class(self) -> str:
        return "AutoModelForMaskedLM" if self.masked else "AutoModelForCausalLM"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in order."""
        return tuple(self.words)

    def packages(self) -> tuple[str, ...]:
        return ("sklearn",)

    def columns(self, context: TaskContext) -> tuple[str, ...]:
        return (*patterns.columns(self.pattern, context), "label")

    def check_setup(self, context: TaskContext) -> list[str]:
        problems = patterns.setup_problems(self.pattern, context, self.masked)
        return problems or word_problems(self._all_words(), self.pattern, context, single=self.masked)

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        label = class_of(example, "label", self.classes)
        words = context.once(self, "words", lambda: [word_ids(w, self.pattern, context) for w in self._all_words()])
        longest = max(map(len, words))
        behind = longest if longest > 1 else 0
        ids, place = patterns.encode(self.pattern, example, context, self.masked, self.truncate, behind)
        if longest == 1:
            return (Features(ids, Said(label, place, 0, tuple(word[0] for word in words))),)
        return tuple(Features([*ids, *word], Said(label, None, len(word), word)) for word in words)

    def count(self, item: Item) -> int:
        return 1

    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        scores, firsts = self._scores(output, batch)
        wanted = batch.tensor([batch.labels[first].label for first in firsts])
        return first_rows(cross_entropy(scores, wanted, reduction="none"), firsts, batch)

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        """The likeliest class, at each item's first row; None at its others."""
        scores, firsts = self._scores(output, batch)
        found: list[Any] = [None] * len(batch.labels)
        for first, best in zip(firsts, scores.argmax(-1).tolist(), strict=True):
            found[first] = best
        return found

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        truth = [item.rows[0].labels.label for item in items]
        return metrics.classification([rows[0] for rows in predictions], truth, len(self.classes))

    def _scores(self, output: Any, batch: TaskBatch) -> tuple[torch.Tensor, list[int]]:
        """Scores of the classes of each item, float32 `[items, classes]`, and the items' first rows."""
        if batch.labels[0].place is not None:
            places = batch.tensor([said.place for said in batch.labels])
            at_mask = output.logits[torch.arange(len(places), device=places.device), places]  # [R, V]
            words, firsts = at_mask[:, batch.tensor(batch.labels[0].words)].float(), list(range(len(places)))
        else:
            words, firsts = by_item(_likelihoods(output.logits, batch), batch)
        means = self._means().to(words)
        return (words[:, :, None] * means).sum(1), firsts  # a product of matrices would be autocast

    def _means(self) -> torch.Tensor:
        """`[words, classes]`: a class's score is the mean of its words'."""
        counts = [len(_as_words(words)) for words in self.words.values()]
        return torch.block_diag(*[torch.full((count, 1), 1 / count) for count in counts])

    def _all_words(self) -> tuple[str, ...]:
        return tuple(word for words in self.words.values() for word in _as_words(words))


def _as_words(words: object) -> tuple[str, ...]:
    """One word or several as a tuple, empty if they are neither."""
    held = (words,) if isinstance(words, str) else words
    good = isinstance(held, (tuple, list)) and all(isinstance(word, str) and word.strip() for word in held)
    return tuple(held) if good else ()  # type: ignore[arg-type]


def _likelihoods(logits: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
    """The mean log-probability of the tokens of the word that ends each row, float32 `[R]`."""
    labels = torch.full_like(batch.input_ids, IGNORED)
    ends = batch.attention_mask.sum(1)
    counts = batch.tensor([said.said for said in batch.labels])
    columns = torch.arange(labels.shape[1], device=labels.device)
    inside = (columns >= (ends - counts)[:, None]) & (columns < ends[:, None])
    labels = torch.where(inside, batch.input_ids, labels)
    return -token_losses(*shifted(logits, labels)).sum(1) / counts
