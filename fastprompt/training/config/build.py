"""From a checked config to the objects that training takes: backbone, tokenizer, jobs, options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastprompt.errors import FastPromptError
from fastprompt.training.config.problems import Problems
from fastprompt.training.config.prompts import PromptEntry
from fastprompt.training.config.run_config import RunConfig
from fastprompt.training.job import Job
from fastprompt.training.padding import embeddings
from fastprompt.training.tasks.base import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

JOB_KEYS = (
    "name", "learning_rate", "weight_decay", "schedule", "warmup", "head_learning_rate", "batch_size", "epochs",
    "steps", "max_grad_norm", "evaluate_every", "patience", "metric", "seed", "shares", "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """The data of one prompt."""

    train: Dataset
    validation: Dataset | None


def load_backbone(config: RunConfig, **changes: Any) -> tuple[PreTrainedModel, Any]:
    """A new backbone of the class that the tasks need, and its tokenizer; `changes` go to `from_pretrained`.

    Weights that the backbone's files lack are drawn from torch's generator: seed it.

    Errors: ConfigError at `run.backbone` or `run.tokenizer`.
    """
    import torch
    import transformers

    from fastprompt import demo

    run, problems = config.run, config.problems()
    path = str(demo.ASSETS) if run.backbone == demo.EMBEDDED else config.resolved(run.backbone)
    options: dict[str, Any] = {"dtype": getattr(torch, run.dtype)}
    if run.attention is not None:
        options["attn_implementation"] = run.attention
    options |= changes
    auto_class = getattr(transformers, config.prompts[0].task.auto_class)
    backbone = tokenizer = None
    with _quiet(), _reported(problems, "backbone", f"a folder, an id on the hub, or {demo.EMBEDDED}"):
        backbone = auto_class.from_pretrained(path, **options).eval()
    named = "backbone" if run.tokenizer is None else "tokenizer"
    with _reported(problems, named, "a folder or an id on the hub that has a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.resolved(run.tokenizer or path))
    problems.raise_all()
    assert backbone is not None and tokenizer is not None
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= embeddings(backbone):
        tokenizer.pad_token = tokenizer.eos_token  # some tokenizers add a padding token that the backbone lacks
    if backbone.config.pad_token_id is None:
        backbone.config.pad_token_id = tokenizer.pad_token_id
    return backbone, tokenizer


def load_examples(config: RunConfig) -> list[Examples]:
    """The data of every prompt, in order; what several prompts name is read once.

    Errors: ConfigError with a problem for each key whose data cannot be read.
    """
    problems = config.problems()
    read: dict[tuple[Any, ...], Any] = {}
    found = []
    for entry, source in zip(config.prompts, config.sources, strict=True):
        parts: dict[str, Any] = {}
        for part in ("train", "validation"):
            call = _call(config, entry, part)
            parts[part] = None
            if call is None:
                continue
            try:
                key = (call["source"], *(repr(value) for value in call.values()))
                parts[part] = read[key] if key in read else read.setdefault(key, _load(call))
            except (FastPromptError, OSError, ValueError) as error:
                problems.add(source.origin(("data", part)), str(error))
        found.append(Examples(parts["train"], parts["validation"]))
    problems.raise_all()
    return found


def job_of(config: RunConfig, entry: PromptEntry, examples: Examples) -> Job:
    """The job of one prompt."""
    given = {key: getattr(entry.table, key) for key in JOB_KEYS}
    init_from = entry.table.init_from
    return Job(
        task=_located(config, entry.task),
        train=examples.train,
        validation=examples.validation,
        config=entry.config,
        init_from=None if init_from is None else config.resolved(init_from),
        template=entry.template,
        **given,
    )


def train_options(config: RunConfig) -> dict[str, Any]:
    """Keywords of `train` that `[run]` decides."""
    run = config.run
    arguments: dict[str, Any] = {
        "gradient_accumulation_steps": run.accumulation,
        "gradient_checkpointing": run.gradient_checkpointing,
        "bf16": run.bf16,
        "use_cpu": run.cpu,
    }
    return {
        "seed": run.seed,
        "save_every": run.save_every,
        "eval_batch_size": run.evaluation_rows,
        "backbone_dropout": run.backbone_dropout,
        "options": arguments,
    }


def _call(config: RunConfig, entry: PromptEntry, part: str) -> dict[str, Any] | None:
    """How to read one part of a prompt's data; None where there is none."""
    data = entry.data
    named = getattr(data, part)
    if named is None:
        return None
    paths = [config.resolved(path) for path in ((named,) if isinstance(named, str) else named)]
    return {
        "source": paths[0] if len(paths) == 1 else tuple(paths),
        "split": getattr(data, f"{part}_split"),
        "subset": data.subset,
        "columns": data.columns,
        "limit": getattr(data, f"{part}_examples"),
    }


def _load(call: Mapping[str, Any]) -> Any:
    import datasets

    from fastprompt.training.data import load

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load(**call)
    finally:
        if shown:
            datasets.enable_progress_bars()


def _located(config: RunConfig, task: Any) -> Task:
    """The task with the file it names, if it names one, found from where the config is."""
    if isinstance(getattr(task, "vocabulary", None), str):
        return replace(task, vocabulary=config.resolved(task.vocabulary))
    return task


@contextmanager
def _reported(problems: Problems, key: str, expected: str) -> Iterator[None]:
    """Turn what transformers raises for a model that is missing or malformed into a problem of the config."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        text = " ".join(str(error).split())
        problems.add(("run", key), f"transformers cannot load it ({text}): expected {expected}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a task head is fresh: every prompt has its own."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
