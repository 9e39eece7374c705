"""Examples of jobs as items, made once for all jobs that would make the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastprompt.model import PromptedModel
from fastprompt.prompts import PromptConfig
from fastprompt.training.job import Job
from fastprompt.training.tasks.base import Item, Task, TaskContext

Items = tuple[list[Item], list[Item]]  # to train on, to be scored on


@dataclass(frozen=True)
class _Made:
    """What became of examples, and all that it depends on."""

    examples: tuple[Any, Any]
    asked: tuple[Any, ...]
    items: Items
    problems: list[str]


_made: ContextVar[list[_Made] | None] = ContextVar("made", default=None)


@contextmanager
def made_once() -> Iterator[None]:
    """Inside the outermost such block jobs of equal data, task, length and template have their items in common."""
    if _made.get() is not None:
        yield
        return
    token = _made.set([])
    try:
        yield
    finally:
        _made.reset(token)


def make_items(model: PromptedModel, job: Job) -> tuple[Items, list[str]]:
    """The job's examples tokenised, and everything that is wrong with them."""
    if not isinstance(job.task, Task):
        return ([], []), []
    length, room = _prompt_length(model, job), _positions(model)
    if room is not None and length >= room:
        return ([], []), [f"job {job.name!r}: {length} virtual tokens, and the backbone has {room} positions"]
    context = TaskContext(
        model.tokenizer,
        model._info.spec,
        length,
        None if room is None else room - length,
        job.template,
        getattr(model.backbone.config, "decoder_start_token_id", None),
        job.max_length,
    )
    items, problems = _known(job, context)
    if not problems and _stands_in_place(model, job) and not _places_tokens(items):
        problems = ["its virtual tokens stand in place, and nothing says where: give a template"]
    return items, [f"job {job.name!r}: {p}" for p in problems]


def counted(model: PromptedModel, job: Job) -> Job:
    """The job in steps, its epochs over the examples that it trains on; as it is where it has none."""
    (train, _), _ = make_items(model, job)
    return job.counted(len(train)) if train else job


def _known(job: Job, context: TaskContext) -> tuple[Items, list[str]]:
    """The items and problems of these examples, out of an earlier call if there was one."""
    made, asked = _made.get(), (job.task, context)
    for one in made or ():
        if one.examples[0] is job.train and one.examples[1] is job.validation and one.asked == asked:
            return one.items, one.problems
    items, problems = _read_both(job, context)
    if made is not None:
        made.append(_Made((job.train, job.validation), asked, items, problems))
    return items, problems


def _read_both(job: Job, context: TaskContext) -> tuple[Items, list[str]]:
    train, problems = _read(job.task, "train", job.train, context)
    if not problems and not any(job.task.count(item) for item in train):
        problems.append("train: no example has anything to learn from: every label is empty")
    validation: list[Item] = []
    if job.validation is not None:
        validation, found = _read(job.task, "validation", job.validation, context)
        problems += found
        if not found and type(job.task).evaluation_items is not Task.evaluation_items:
            validation = job.task.evaluation_items(job.validation, context)
    return (train, validation), problems


def _read(task: Task, part: str, examples: Any, context: TaskContext) -> tuple[list[Item], list[str]]:
    if not hasattr(examples, "column_names"):
        came = f"{part} is {type(examples).__name__}, expected a data set"
        return [], [f"{came}: fastprompt.training.data.load reads lists, files and more"]
    items, problems = task.prepare(examples, context)
    return items, [f"{part}: {problem}" for problem in problems]


def _prompt_length(model: PromptedModel, job: Job) -> int:
    """Virtual tokens of the job's prompt, 0 where something is wrong with it."""
    if job.name in model.library:
        return model.library[job.name].length
    return job.config.num_virtual_tokens if isinstance(job.config, PromptConfig) else 0


def _stands_in_place(model: PromptedModel, job: Job) -> bool:
    config = model.library[job.name].config if job.name in model.library else job.config
    return getattr(config, "in_place", False)


def _places_tokens(items: Items) -> bool:
    """Whether every row says where virtual tokens stand."""
    return all(any(i < 0 for i in row.input_ids) for part in items for item in part for row in item.rows)


def _positions(model: PromptedModel) -> int | None:
    """How many positions the backbone has, None where they are unbounded."""
    if model._info.max_positions is not None:
        return model._info.max_positions
    if model._info.encoder_decoder:
        return None
    return getattr(model.backbone.config.get_text_config(decoder=True), "max_position_embeddings", None)
