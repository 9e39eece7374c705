"""Prompts and other ways to learn the same tasks, in one table of quality and cost."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from fastprompt.model import PromptedModel
from fastprompt.prompts.init import seeded
from fastprompt.training import arguments, memory
from fastprompt.training.collate import Collator
from fastprompt.training.comparators import FULL, LORA, Comparator, build
from fastprompt.training.items import Items
from fastprompt.training.job import Job
from fastprompt.training.mixture import Mixture, Stream
from fastprompt.training.padding import pad_token_id
from fastprompt.training.quiet import without_dropout
from fastprompt.training.result import Listener, TrainResult
from fastprompt.training.run import train
from fastprompt.training.state import Run
from fastprompt.training.trainer import MixedTrainer

MEASURED_STEPS = 5


@dataclass(frozen=True)
class Comparison:
    """One way to learn one task.

    `peak_memory` is in bytes, as in `TrainResult`; `stored_bytes` is what must be kept, None for what was not saved.
    """

    task: str
    way: str
    score: float | None
    metric: str
    trained_parameters: int
    stored_bytes: int | None
    peak_memory: int | None
    step_seconds: float
    steps: int
    refused: str | None = None


def compare(
    comparator: Comparator,
    job: Job,
    items: Items,
    load: Callable[[], tuple[Any, Any]],
    *,
    causal: bool,
    options: Mapping[str, Any],
    eval_batch_size: int = 32,
    seed: int = 0,
    listen: Listener | None = None,
) -> Comparison:
    """Learn a job's examples in another way.

    Args:
        items: the job's examples to train on and to be scored on, as `make_items` gives them.
        load: gives a new backbone, which is changed, and its tokenizer.
        causal: whether the backbone's attention is.
        options, eval_batch_size, seed, listen: as in `train`.
    """
    own = comparator.job(job)
    if refused := comparator.refusal(job):
        return Comparison(job.name, comparator.kind, None, own.best_metric, 0, 0, None, 0.0, 0, refused)
    own = own.counted(len(items[0]))
    with seeded(own.seed):  # a fresh head is drawn at loading
        backbone, tokenizer = load()
    model = build(comparator, own, backbone, tokenizer, causal=causal)
    run: Any = Run(
        model,  # type: ignore[arg-type]
        [own],
        Mixture([Stream(own, items[0])]),
        Collator([own], pad_token_id(model)),
        [items[1]],
        [{}],
        eval_batch_size,
        listen=listen,
        keeps_best=False,  # nothing but its score is asked for, and a copy may be of all the backbone
    )
    trainer, peak = _train(run, comparator.kind in (FULL, LORA), options, seed)
    trained = trainer.parameters[0].all
    return Comparison(
        job.name,
        comparator.kind,
        run.states[0].best_score,
        own.best_metric,
        sum(p.numel() for p in trained),
        sum(p.numel() * p.element_size() for p in trained),
        peak,
        trainer.median_step,
        trainer.state.global_step,
    )


def _train(run: Run, whole: bool, options: Mapping[str, Any], seed: int) -> tuple[MixedTrainer, int | None]:
    """The trainer after training, and peak bytes; a `whole` backbone learns with its dropout and checkpointing."""
    model, mixture = run.model, run.mixture
    with tempfile.TemporaryDirectory() as scratch, nullcontext() if whole else without_dropout(model.backbone):
        args = arguments.training_arguments(options, Path(scratch), mixture.steps, seed)
        mixture.divide(args.gradient_accumulation_steps, args.world_size, args.process_index)
        if whole and options.get("gradient_checkpointing"):
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.to(args.device)
        trainer = MixedTrainer(run, args)
        trainer.remove_callback(PrinterCallback)
        gc.collect()
        memory.reset_peak(args.device)
        trainer.train()
        return trainer, memory.peak_bytes(args.device)


def of_prompt(model: PromptedModel, job: Job, found: Mapping[str, Any], options: Mapping[str, Any]) -> Comparison:
    """A trained prompt's own line; its cost is measured on a few steps of it alone.

    `found` has its "score", "steps" and "stored_bytes"; `options` as in `train`.
    """
    changes: dict[str, Any] = {"validation": None, "patience": None, "epochs": None, "steps": MEASURED_STEPS}
    alone = replace(job, name=f"{job.name} alone", shares=None, **changes)
    if alone.config is None:
        alone = replace(alone, config=model.library[job.name].config, init_from=None)
    gc.collect()
    result: TrainResult = train(model, [alone], options=options)
    model.remove_prompt(alone.name)
    return Comparison(
        job.name,
        model.library[job.name].config.method,
        found["score"],
        job.best_metric,
        result.jobs[alone.name].trained_parameters,
        found["stored_bytes"],
        result.peak_memory,
        result.step_seconds,
        found["steps"],
    )
