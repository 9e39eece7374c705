"""From jobs to a run: everything that can be wrong is found here, before any training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import transformers

from fastprompt.errors import ArgumentError, FastPromptError, TrainingError
from fastprompt.integrations.transformers.backbone import evaluating
from fastprompt.model import PromptedModel
from fastprompt.prompts import SoftPrompt
from fastprompt.store import load_prompt
from fastprompt.training import evaluation
from fastprompt.training.arguments import check_options
from fastprompt.training.collate import Collator
from fastprompt.training.items import Items, made_once, make_items
from fastprompt.training.job import Job
from fastprompt.training.padding import embeddings, own_pad, pad_token_id
from fastprompt.training.tasks.base import Item, Task

_POOLED = "AutoModelForSequenceClassification"  # a decoder of this class answers at the last token that is no padding


@dataclass(frozen=True)
class Prepared:
    """Jobs that can train: the items of each, and the names of the prompts that were added to the model for them."""

    items: list[Items]
    added: list[str]


def listed(model: object, jobs: object) -> tuple[Job, ...]:
    """The jobs, where these are a model and jobs at all. Errors: TrainingError."""
    if not isinstance(model, PromptedModel):
        raise TrainingError([f"model is {type(model).__name__}, expected PromptedModel(backbone, tokenizer)"])
    if not isinstance(jobs, Iterable):
        raise TrainingError([f"jobs is {type(jobs).__name__}, expected a list of Job"])
    jobs = tuple(jobs)
    if other := [job for job in jobs if not isinstance(job, Job)]:
        raise TrainingError([f"jobs has {type(other[0]).__name__}, expected Job(name=..., task=..., train=...)"])
    return jobs


def prepare(model: PromptedModel, jobs: Sequence[Job], problems: Sequence[str] = ()) -> Prepared:
    """Add the jobs' prompts to the model and tokenise their examples.

    Errors: TrainingError with `problems` and everything else that is wrong; the model is then as before.
    """
    found = [*problems, *check_jobs(model, jobs)]
    sound = [job for job in jobs if not any(problem.startswith(f"job {job.name!r}: ") for problem in found)]
    added, wrong = add_prompts(model, sound)
    found += wrong
    items: list[Items] = []
    try:
        with made_once():
            for job in jobs if model.tokenizer is not None else ():
                made, wrong = make_items(model, job)
                items.append(made)
                found += wrong
        if not found:
            for job, made in zip(jobs, items, strict=True):
                found += _metric_problems(model, job, made[1])
        raise_problems(found)
    except BaseException:
        for name in added:
            model.remove_prompt(name)
        raise
    return Prepared(items, added)


def check(model: PromptedModel, jobs: Sequence[Job], options: Mapping[str, Any] | None = None) -> None:
    """Raise the TrainingError that `train` would raise, without training; the model stays as it is."""
    for name in prepare(model, listed(model, jobs), check_options(options or {})).added:
        model.remove_prompt(name)


def check_jobs(model: PromptedModel, jobs: Sequence[Job]) -> list[str]:
    """What is wrong with the jobs, before their data are looked at."""
    if not jobs:
        return ["jobs is empty, expected at least one Job"]
    by_name = {job.name: job for job in jobs}
    problems = []
    for job in jobs:
        found = job.problems() + _place_problems(model, job, by_name) + _backbone_problems(model, job.task)
        if sum(job.name == other.name for other in jobs) > 1:
            found.append("another job has this name: give each its own")
        problems += [f"job {job.name!r}: {problem}" for problem in dict.fromkeys(found)]
    if model.tokenizer is None:
        problems.append("the model has no tokenizer: make it with PromptedModel(backbone, tokenizer)")
    return problems


def _place_problems(model: PromptedModel, job: Job, jobs: Mapping[str, Job]) -> list[str]:
    """Whether the job's prompt is there, or can be made."""
    there = job.name in model.library
    if job.shares is not None:
        source = jobs.get(job.shares)
        if source is None or source is job or source.shares is not None:
            return [f"shares is {job.shares!r}, expected the name of another job that shares none itself"]
        return ["a prompt of this name is in the model already: choose another name"] if there else []
    if there and (job.config is not None or job.init_from is not None):
        return ["a prompt of this name is in the model already: remove it, or leave out config to train it further"]
    if not there and job.config is None and job.init_from is None:
        return ["no prompt of this name is in the model: give config for a fresh one"]
    return []


def _backbone_problems(model: PromptedModel, task: Task) -> list[str]:
    """Whether the backbone is of the class the task needs, and finds the ends of padded rows."""
    if not isinstance(task, Task):
        return []
    backbone = model.backbone
    mapping = getattr(transformers, task.auto_class)._model_mapping
    try:
        classes = mapping[type(backbone.config)]
    except KeyError:
        classes = ()
    classes = classes if isinstance(classes, (tuple, list)) else (classes,)
    if not isinstance(backbone, tuple(classes)):
        return [f"{task.name} needs a backbone of {task.auto_class}, and this one is {type(backbone).__name__}"]
    if task.auto_class == _POOLED and model._info.looks_up_ids:
        pad, count = own_pad(backbone), embeddings(backbone)
        if pad is None:
            return ["the backbone's config has no pad_token_id, by which it finds the last token of a text: set it"]
        if pad >= count:
            return [
                f"the backbone's config has pad_token_id {pad}, by which it finds the last token of a text, and "
                f"embeddings for tokens below {count}: set it to one of those, or add one with resize_token_embeddings"
            ]
    return []


def add_prompts(model: PromptedModel, jobs: Sequence[Job]) -> tuple[list[str], list[str]]:
    """Add every job's prompt that is not there; returns the names added, and what went wrong."""
    added: list[str] = []
    problems: list[str] = []
    for job in sorted(jobs, key=lambda job: job.shares is not None):  # owners before sharers
        try:
            if _add_prompt(model, job):
                added.append(job.name)
            prompt = model.library[job.name]
            _check_head(prompt, job)
            if job.template is not None:
                job.template.check(prompt)
            if prompt.noise.seed is None:
                prompt.noise.seed = job.seed
        except FastPromptError as error:
            problems.append(f"job {job.name!r}: {error}")
    return added, problems


def _add_prompt(model: PromptedModel, job: Job) -> bool:
    head: dict[str, Any] = {"num_labels": job.task.num_labels(), "labels": job.task.labels(), "seed": job.seed}
    if job.shares is not None:
        model.share_prompt(job.name, job.shares, **head)
    elif job.init_from is not None:
        known = job.init_from in model.library
        start = model.library[job.init_from] if known else load_prompt(job.init_from, model._info.spec)
        model.add_prompt(job.name, job.config or start.config, init_from=start, **head)
    elif job.config is not None:
        model.add_prompt(job.name, job.config, **head)
    else:
        return False
    return True


def _check_head(prompt: SoftPrompt, job: Job) -> None:
    wanted = job.task.num_labels()
    if wanted is None or prompt.head is None:
        if wanted is not None:
            raise ArgumentError(f"its prompt has no head, and {job.task.name} needs one of {wanted} outputs")
        return
    if prompt.head.outputs != wanted:
        raise ArgumentError(f"its prompt's head has {prompt.head.outputs} outputs, and {job.task.name} needs {wanted}")


def _metric_problems(model: PromptedModel, job: Job, validation: Sequence[Item]) -> list[str]:
    """Whether a metric that the job names is among the scores, found by scoring its first example."""
    if job.metric is None or not validation:
        return []
    one = {0: validation[:1]}
    with evaluating(model):
        found = evaluation.predict(model, Collator([job], pad_token_id(model)), one, 1)
    scores = evaluation.score([job], one, found)[0]
    if job.metric in scores:
        return []
    return [f"job {job.name!r}: metric is {job.metric!r}, expected one of {', '.join(map(repr, scores))}"]


def describe(job: Job, items: Items) -> dict[str, Any]:
    """The job in JSON types, with digests of its data: equal for jobs that train alike."""
    skipped = {"task", "train", "validation", "config", "template"}
    options = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in skipped}
    config = None if job.config is None else {"method": job.config.method, **job.config.to_dict()}
    return {
        **options,
        "task": repr(job.task),
        "config": config,
        "template": None if job.template is None else repr(job.template),
        "train_digest": _digest(items[0]),
        "validation_digest": _digest(items[1]),
    }


def _digest(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr([(row.input_ids, row.labels) for row in item.rows]).encode())
    return digest.hexdigest()[:16]


def raise_problems(problems: Sequence[str]) -> None:
    """Raise all of them at once, if there are any."""
    if problems:
        raise TrainingError(problems)
