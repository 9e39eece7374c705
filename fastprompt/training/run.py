"""`train`: any number of prompts in one run over one frozen backbone."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from fastprompt.model import PromptedModel
from fastprompt.training import arguments, memory, prepare
from fastprompt.training.checkpoint import checkpoints, keep_newest
from fastprompt.training.collate import Collator
from fastprompt.training.fingerprint import fingerprint
from fastprompt.training.job import Job
from fastprompt.training.mixture import Mixture, Stream
from fastprompt.training.padding import pad_token_id
from fastprompt.training.result import JobResult, Listener, Pruner, TrainResult
from fastprompt.training.resume import check_same_run
from fastprompt.training.session import training_state
from fastprompt.training.settings import Settings
from fastprompt.training.state import Run
from fastprompt.training.trainer import MixedTrainer


def train(
    model: PromptedModel,
    jobs: Sequence[Job],
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int | None = None,
    keep_checkpoints: int = 2,
    eval_batch_size: int = 32,
    backbone_dropout: bool = False,
    load_best: bool = True,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    listen: Listener | None = None,
    prune: Pruner | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train every job's prompt and head, all in one run of transformers' Trainer; nothing else changes.

    Semantics:
        result = train(model, [Job(name="a", task=..., train=..., config=PromptTuning(...), steps=100), ...])
        model(**batch, prompts="a")       # the prompts are in the model, as they scored best
        result.jobs["a"].scores
    Each step's rows of all running jobs share every forward and backward. A job gets the gradients, updates and order
    of examples that it would get alone; one that has stopped costs nothing.

    Args:
        output_dir: takes `prompts/NAME` (as training left them), `best/NAME` (as they scored best) and
            `checkpoint-STEP`; None writes nothing.
        resume: go on from the newest checkpoint in `output_dir`, if there is one, to bitwise the same prompts.
        overwrite: start anew where `output_dir` holds a former run.
        save_every: optimiser steps between checkpoints; None: at the end only.
        eval_batch_size: rows in a batch of predictions.
        backbone_dropout: whether the backbone's own dropout acts; then results depend on the batch.
        load_best: whether the model ends with each prompt as it scored best, or as training left it.
        seed: of dropout in prompts (and the backbone); inits and orders follow each job's.
        options: fields of `TrainingArguments` that leave prompts apart, such as `bf16`, `gradient_accumulation_steps`,
            `gradient_checkpointing`, `use_cpu`, `logging_steps`, `report_to`.
        listen: told of every step, in the main process.
        prune: told of every evaluation, in every process; returns the names of jobs to stop.
        callbacks: for the Trainer.
    Errors: TrainingError names everything that is wrong, before any training; the model is then as before.
    """
    jobs = prepare.listed(model, jobs)
    asked = Settings(
        None if output_dir is None else Path(output_dir),
        resume,
        overwrite,
        save_every,
        keep_checkpoints,
        eval_batch_size,
        backbone_dropout,
        load_best,
        seed,
        dict(options or {}),
    )
    prepared = prepare.prepare(model, jobs, asked.problems())
    try:
        run = _run_of(model, jobs, prepared, asked)
        run.listen, run.prune = listen, prune
        return _train(run, asked, callbacks)
    except BaseException:
        for name in prepared.added:
            model.remove_prompt(name)
        raise


def _run_of(model: PromptedModel, jobs: Sequence[Job], prepared: prepare.Prepared, asked: Settings) -> Run:
    """The run of jobs that were found sound; what tells runs apart is computed only where something is written."""
    pairs = list(zip(jobs, prepared.items, strict=True))
    counted = [job.counted(len(train)) for job, (train, _) in pairs]
    return Run(
        model,
        counted,
        Mixture([Stream(job, train) for job, (train, _) in zip(counted, prepared.items, strict=True)]),
        Collator(counted, pad_token_id(model)),
        [validation for _, (_, validation) in pairs],
        [prepare.describe(job, made) for job, made in pairs] if asked.output else [],
        asked.eval_batch_size,
        backbone=fingerprint(model.backbone) if asked.output else {},
        output=asked.output,
        save_every=asked.save_every,
        keep_checkpoints=asked.keep_checkpoints,
    )


def _train(run: Run, asked: Settings, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    """Run the Trainer, from the newest checkpoint where that is asked for."""
    model, output = run.model, run.output
    if asked.overwrite and output is not None:
        _start_anew(output, run.jobs)
    found = checkpoints(output) if asked.resume and output is not None else []
    if found:
        check_same_run(run, found[-1])
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = arguments.training_arguments(asked.options, folder, run.mixture.steps, asked.seed)
        run.mixture.divide(args.gradient_accumulation_steps, args.world_size, args.process_index)
        stack.enter_context(training_state(run, asked.options, asked.backbone_dropout))
        if model.device != args.device and not getattr(model.backbone, "hf_device_map", None):
            model.to(args.device)
        trainer = MixedTrainer(run, args, callbacks)
        trainer.remove_callback(PrinterCallback)
        memory.reset_peak(args.device)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        seconds = time.perf_counter() - started
        peak = memory.peak_bytes(args.device)
    _finish(run, asked.load_best, args.should_save)
    steps = trainer.state.global_step
    results = {job.name: _job_result(run, trainer, j, asked.load_best) for j, job in enumerate(run.jobs)}
    return TrainResult(results, steps, seconds, trainer.median_step, peak)


def _finish(run: Run, load_best: bool, writes: bool) -> None:
    """Write the prompts as training left them, then put the best ones into the model."""
    for j, state in enumerate(run.states):
        state.stop("finished", run.mixture.totals[j])
        if run.output is not None and writes and state.stopped_at is not None:
            run.save_prompt(j, "prompts", state.stopped_at)
    if load_best:
        run.load_best()


def _job_result(run: Run, trainer: MixedTrainer, j: int, load_best: bool) -> JobResult:
    state = run.states[j]
    held = state.best_step if load_best and j in run.best else state.stopped_at
    return JobResult(
        name=state.name,
        scores=state.scores_at(held),
        best_score=state.best_score,
        best_step=state.best_step,
        steps=state.stopped_at or 0,
        stopped=state.stopped or "",
        trained_parameters=sum(p.numel() for p in trainer.parameters[j].all),
        history=state.history,
        losses=state.losses,
    )


def _start_anew(output: Path, jobs: Sequence[Job]) -> None:
    """Remove the checkpoints of a former run, and prompts of its that could be taken for these jobs'."""
    keep_newest(output, 0)
    for job in jobs:
        for kind in ("prompts", "best"):
            shutil.rmtree(output / kind / job.name, ignore_errors=True)
