"""What a task is: how examples become rows of a batch, what a row's loss is, and how answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from fastprompt.spec import BackboneSpec
from fastprompt.training import packages

T = TypeVar("T")
IGNORED = -100  # the label of a token that has none
_SHOWN = 5  # faulty examples that are described one by one


class Examples(Protocol):
    """What a task needs of a `datasets.Dataset`; a list of dicts is read by `fastprompt.training.data.load`."""

    @property
    def column_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class ExampleError(Exception):
    """One example cannot become rows; the message says why."""


@dataclass(frozen=True)
class Features:
    """One row of a batch, without padding.

    `input_ids` may hold `-1 - k` for the k-th virtual token of an in-place prompt. `labels` is the task's own: a list
    of int a token, an int, a (start, end) pair. `decoder_input_ids` is for encoder-decoders only.
    """

    input_ids: list[int]
    labels: Any = None
    token_type_ids: list[int] | None = None
    decoder_input_ids: list[int] | None = None


@dataclass(frozen=True)
class Item:
    """One example as rows that stay together: usually one, several for multiple choice and question answering.

    `example` is the index into the dataset.
    """

    rows: tuple[Features, ...]
    example: int


@dataclass(frozen=True)
class TaskContext:
    """What a task may know when it turns examples of one job into items.

    `max_length` is the number of text tokens that fit behind the prompt; None where positions are unbounded.
    `template` is the `Template` of an in-place prompt, whose rows hold the virtual tokens among their own.
    `decoder_start_token_id` is an encoder-decoder's. `longest_text` is the job's own bound on a text, its `max_length`.
    """

    tokenizer: Any
    spec: BackboneSpec
    prompt_length: int
    max_length: int | None = None
    template: Any = None
    decoder_start_token_id: int | None = None
    longest_text: int | None = None
    _made: dict[tuple[int, str], tuple[object, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once(self, owner: object, what: str, make: Callable[[], T]) -> T:
        """What `make` gives, made at the first call for this task: what it needs for every example of a job."""
        key = (id(owner), what)
        if key not in self._made:
            self._made[key] = (owner, make())  # the owner is kept, so that no other one gets its id
        return self._made[key][1]

    @property
    def longest_row(self) -> int | None:
        """The longest `input_ids` that the backbone has positions for; None where they are unbounded."""
        if self.max_length is None:
            return None
        return self.max_length + self._placed

    def room(self, behind: int = 0) -> int | None:
        """The most ids that a text may have before `behind` others, virtual tokens in place counted; None: no bound."""
        bounds = []
        if self.longest_row is not None:
            bounds.append(self.longest_row - behind)
        if self.longest_text is not None:
            bounds.append(self.longest_text + self._placed)
        return min(bounds, default=None)

    def side(self, truncate: str | None) -> str | None:
        """Where a text that is too long is cut: where the task says, or at its end if the job bounds texts."""
        return "end" if truncate is None and self.longest_text is not None else truncate

    @property
    def _placed(self) -> int:
        """Virtual tokens among a row's own ids."""
        return self.prompt_length if self.template is not None else 0


@dataclass(frozen=True)
class TaskBatch:
    """The rows of one task inside a mixed batch, padded on the right.

    `input_ids`, `attention_mask` int64 `[R, N]`; of each row `labels[r]` is its `Features.labels`, `prompts[r]` its
    prompt's name and `items[r]` the place in this batch (0, 1, ...) of the item that it belongs to: rows of one item
    stand together.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: Sequence[Any]
    prompts: Sequence[str]
    items: Sequence[int]

    def padded_labels(self, length: int | None = None) -> torch.Tensor:
        """Labels of every token, int64 `[R, length]` (None: N), `IGNORED` at padding, on the batch's device."""
        width = self.input_ids.shape[1] if length is None else length
        return self.tensor([[*labels, *[IGNORED] * (width - len(labels))] for labels in self.labels])

    def tensor(self, values: Sequence[Any]) -> torch.Tensor:
        """`values` as int64 on the batch's device."""
        return torch.tensor(values, dtype=torch.long).to(self.input_ids.device, non_blocking=True)


class Task(ABC):
    """A kind of question that prompts learn to answer; equal tasks of several jobs share one loss computation.

    Semantics:
        items, problems = task.prepare(examples, context)   # before any training: rows, and everything that is wrong
        losses = task.losses(output, batch)                 # [R], summed over what a row counts for
        loss = losses.sum() / sum(task.count(item) for item in items)
        score = task.score(predictions, examples, items)    # higher is better
    Subclasses are frozen dataclasses, so that they compare by their fields.
    """

    name: ClassVar[str]  # in configuration files: "causal_lm", "sequence_classification", ...
    metric: ClassVar[str]  # the score that chooses the best prompt, unless a job names another

    @property
    @abstractmethod
    def auto_class(self) -> str:
        """The transformers class that the backbone must be of: "AutoModelForCausalLM", ..."""

    def num_labels(self) -> int | None:
        """Outputs of the trainable head, None without one."""
        return None

    def labels(self) -> tuple[str, ...] | None:
        """Names of the head's outputs."""
        return None

    @abstractmethod
    def columns(self, context: TaskContext) -> tuple[str, ...]:
        """Columns that every data set of this task must have."""

    @abstractmethod
    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        """The rows of one example, none to leave it out; an ExampleError says what is wrong with it."""

    def packages(self) -> tuple[str, ...]:
        """What its scores are computed with, of the packages of the extra `train`."""
        return ()

    def check_setup(self, context: TaskContext) -> list[str]:
        """What is wrong with the tokenizer or the template, whatever the examples are."""
        if context.template is not None:
            return [f"{self.name} takes no template: use a prompt that stands before the text"]
        return []

    def positions(self, row: Features) -> int:
        """Positions that a row takes, to be compared with `TaskContext.longest_row`."""
        return len(row.input_ids)

    def prepare(self, examples: Examples, context: TaskContext) -> tuple[list[Item], list[str]]:
        """The examples as items, in order, and every problem of them, one sentence each."""
        problems = packages.missing(self.name, self.packages()) + self.check_setup(context)
        problems += _check_columns(examples, self.columns(context))
        if problems:
            return [], problems
        items: list[Item] = []
        faults: list[str] = []
        for index in range(len(examples)):
            try:
                rows = self.encode(examples[index], context)
                self._check_room(rows, context)
            except ExampleError as error:
                faults.append(f"example {index}: {error}")
            else:
                items += [Item(rows, index)] if rows else []
        if len(faults) > _SHOWN:
            faults[_SHOWN:] = [f"{len(faults) - _SHOWN} more of {len(examples)} examples have such problems"]
        if not items and not faults:
            faults = [f"none of the {len(examples)} examples can be used"]
        return items, faults

    def check(self, examples: Examples, context: TaskContext) -> list[str]:
        """Every problem of these examples, one sentence each: none, a missing column, an unknown label, too long."""
        return self.prepare(examples, context)[1]

    def items(self, examples: Examples, context: TaskContext) -> list[Item]:
        """The examples without problems as items, in order."""
        return self.prepare(examples, context)[0]

    def evaluation_items(self, examples: Examples, context: TaskContext) -> list[Item]:
        """The examples to predict for, in order."""
        return self.items(examples, context)

    def count(self, item: Item) -> int:
        """How many losses `losses` sums for this item: its labelled tokens, or its rows where a label is no list."""
        return sum(
            sum(label != IGNORED for label in row.labels) if isinstance(row.labels, list) else 1 for row in item.rows
        )

    @abstractmethod
    def losses(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        """The summed loss of every row, float32 `[R]`; `output` is the model's for these rows, with the batch's N."""

    @abstractmethod
    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        """One prediction a row, as Python or numpy objects."""

    @abstractmethod
    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        """Scores by name; `predictions[i]` holds those of the rows of `items[i]`."""

    def _check_room(self, rows: Sequence[Features], context: TaskContext) -> None:
        room = context.longest_row
        for row in rows:
            if not row.input_ids:
                raise ExampleError("its text has no tokens")
            beyond = max(*row.input_ids, *(row.decoder_input_ids or ()), 0)
            if beyond >= context.spec.vocab_size:
                raise ExampleError(
                    f"it has token {beyond}, and the backbone embeddings for tokens below {context.spec.vocab_size}: "
                    "give the backbone its own tokenizer, or embeddings for added tokens with resize_token_embeddings"
                )
            needed = self.positions(row)
            if room is not None and needed > room:
                raise ExampleError(
                    f"{len(row.input_ids)} tokens need {needed} positions, and the backbone has {room} beside a prompt "
                    f"of {context.prompt_length}: shorten the text or the prompt"
                    + (' or set truncate="end" or "start"' if getattr(self, "truncate", "end") is None else "")
                )


class GenerationTask(Task):
    """A task whose answers are generated: evaluation calls `generate` in place of a forward and `predict`."""

    @abstractmethod
    def generate(self, model: Any, batch: TaskBatch) -> list[Any]:
        """One answer a row; `batch` is padded on the right (`PromptedModel.generate` takes either side)."""

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        return self.generate(model, batch)


def _check_columns(examples: Examples, needed: Sequence[str]) -> list[str]:
    if len(examples) == 0:
        return ["the data set is empty, expected at least one example"]
    there = list(examples.column_names)
    return [
        f"column {name!r} is missing, the data set has {', '.join(map(repr, there))}: "
        f'name another one so with columns={{"...": "{name}"}}'
        for name in needed
        if name not in there
    ]
