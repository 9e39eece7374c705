"""transformers' Trainer for many prompts: mixed passes; a loss, evaluations and an end for each; small checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastprompt.training import evaluation
from fastprompt.training.checkpoint import (
    Checkpoint,
    keep_newest,
    pack_optimizer,
    random_state,
    set_random_state,
    unpack_optimizer,
)
from fastprompt.training.collate import split_losses
from fastprompt.training.optimizer import JobParameters, build_optimizer, clip_gradients
from fastprompt.training.result import Progress
from fastprompt.training.resume import pack_run, unpack_run
from fastprompt.training.state import Run
from fastprompt.training.stopping import DIVERGED, FINISHED, PRUNED, snapshot


class _Passes:
    """The run's passes from the trainer's step on, as batches."""

    def __init__(self, trainer: MixedTrainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.args.max_steps * self.trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        run, step = self.trainer.run, self.trainer.state.global_step
        while passes := run.mixture.passes(step):  # drawn when the step begins: after it is known who has stopped
            for drawn in passes:
                yield {"batch": run.collator(drawn)}
            step += 1


class MixedTrainer(Trainer):
    """Trains every prompt of a run as it would be trained alone."""

    control: Any

    def __init__(self, run: Run, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.run = run
        self.parameters = [
            JobParameters.of(prompt, shares=job.shares is not None)
            for job, prompt in zip(run.jobs, run.prompts, strict=True)
        ]
        self.step_seconds: list[float] = []
        self._sums = torch.zeros(len(run.jobs), dtype=torch.float32, device=arguments.device)
        self._summed = [0] * len(run.jobs)
        self._loaded: Checkpoint | None = None
        self._began = self._step_began = time.perf_counter()
        super().__init__(
            run.model,
            arguments,
            data_collator=run.collator,
            optimizers=build_optimizer(
                run.jobs,
                self.parameters,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                eps=arguments.adam_epsilon,
            ),
            callbacks=[_Keeper(self), *callbacks],
        )
        self.model_accepts_loss_kwargs = True  # the loss is scaled for accumulation already

    # passes ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return _Passes(self)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        self._step_began = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, len(batches) or None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs["batch"].to(self.args.device)
        self.run.set_draws(batch.jobs, self.state.global_step)
        output = model(**batch.model_inputs, prompts=batch.prompts)
        losses = split_losses(batch, output) * batch.weights
        self._sums.index_add_(0, batch.job_index, losses.detach())
        loss = losses.sum() * self.args.world_size  # processes' gradients are averaged
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        return None  # a common norm says nothing: `clip_gradients` knows every job's

    # steps -----------------------------------------------------------------------------------------------------------

    def clip(self) -> None:
        """Bound the gradients; a job whose gradient is not finite stops."""
        step = self.state.global_step
        norms = clip_gradients(self.run.jobs, self.parameters)
        for j in self.run.mixture.running(step):
            self._summed[j] += 1
            if not math.isfinite(norms[j]):
                self.run.stop(j, DIVERGED, step)

    def step_ended(self) -> None:
        """Note who is done and who is to be scored after this step."""
        self.step_seconds.append(time.perf_counter() - self._step_began)
        run, step = self.run, self.state.global_step
        trained = run.mixture.running(step - 1)
        run.set_draws(trained, step)
        due = [j for j in trained if run.jobs[j].evaluates_at(step)]
        self.control.should_evaluate = bool(due)
        for j in trained:
            if run.mixture.totals[j] == step and j not in due:
                run.states[j].stop(FINISHED, step)
        if not due:
            self._settle(evaluated=False)

    def _settle(self, evaluated: bool) -> None:
        """After a step and its evaluations: stop or save if it is time, and tell the listener."""
        run, step = self.run, self.state.global_step
        over = not run.mixture.running(step)
        if over:
            self.control.should_training_stop = True
        due = over or (run.save_every is not None and step % run.save_every == 0)
        self.control.should_save = run.output is not None and due
        if run.listen is not None and self.is_world_process_zero():
            run.listen(self._progress(evaluated))

    def _progress(self, evaluated: bool) -> Progress:
        run = self.run
        owners = {p: g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        rates = {
            job.name: owners[own.all[0]] if own.all else 0.0 for job, own in zip(run.jobs, self.parameters, strict=True)
        }
        return Progress(
            step=self.state.global_step,
            steps=run.mixture.steps,
            seconds=time.perf_counter() - self._began,
            losses={state.name: state.losses[-1][1] for state in run.states if state.losses},
            rates=rates,
            states={state.name: state for state in run.states},
            evaluated=evaluated,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            for state, total, count in zip(self.run.states, sums, self._summed, strict=True):
                if count:
                    state.losses.append((self.state.global_step, total / count))
                    logs[f"loss/{state.name}"] = total / count
            self._sums.zero_()
            self._summed = [0] * len(self.run.jobs)
        super().log(logs, start_time)

    # evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the jobs that are due after this step, and all of them outside of training."""
        run, step = self.run, self.state.global_step
        due = [j for j in range(len(run.jobs)) if run.validation[j]]
        if self.is_in_train:
            trained = run.mixture.running(step - 1)
            due = [j for j in due if j in trained and run.jobs[j].evaluates_at(step)]
            for j in (j for j in due if not run.is_finite(j)):
                run.stop(j, DIVERGED, step)
        scores = self._scores([j for j in due if run.states[j].stopped != DIVERGED])
        if self.is_in_train:
            self._take_in(scores)
        metrics = {
            f"{metric_key_prefix}_{run.jobs[j].name}_{k}": v for j, found in scores.items() for k, v in found.items()
        }
        if metrics:
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train:
            self._settle(evaluated=True)
        return metrics

    def _scores(self, due: Sequence[int]) -> dict[int, dict[str, float]]:
        run, args = self.run, self.args
        items = {j: run.validation[j] for j in due}
        self.model.eval()
        predictions = evaluation.predict(
            run.model,
            run.collator,
            items,
            run.eval_rows,
            process=args.process_index,
            processes=args.world_size,
            gather=gather_object if args.world_size > 1 else None,
        )
        return evaluation.score(run.jobs, items, predictions)

    def _take_in(self, scores: Mapping[int, Mapping[str, float]]) -> None:
        """Keep what is best so far; stop whom patience, the last step or the pruner stops."""
        run, step = self.run, self.state.global_step
        for j, found in scores.items():
            state = run.states[j]
            if state.record(run.jobs[j], step, found):
                if run.keeps_best:
                    run.best[j] = snapshot(run.prompts[j])
                if run.output is not None and self.args.should_save:
                    run.save_prompt(j, "best", step)
            if run.mixture.totals[j] == step:
                state.stop(FINISHED, step)
        names = {state.name: j for j, state in enumerate(run.states)}
        losers: Iterable[str] = () if run.prune is None else run.prune(step, {s.name: s for s in run.states})
        for name in losers:
            run.states[names[name]].stop(PRUNED, step)
        run.mixture.stopped |= {j for j, state in enumerate(run.states) if not state.running}

    # checkpoints -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint of this step in one piece, and drop old ones."""
        run, args = self.run, self.args
        assert run.output is not None
        generators = [random_state(args.device)]
        if args.world_size > 1:
            generators = gather_object(generators)
        if not args.should_save:
            return
        moments, groups = pack_optimizer(self.optimizer)
        tensors, state = pack_run(run)
        tensors |= {f"optimizer/{key}": tensor for key, tensor in moments.items()} | {"loss_sums": self._sums.clone()}
        state |= {
            "groups": groups,
            "schedule": self.lr_scheduler.state_dict(),
            "random": generators,
            "summed": self._summed,
        }
        Checkpoint(tensors, state).write(run.output / f"checkpoint-{self.state.global_step}", asdict(self.state))
        keep_newest(run.output, run.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put prompts and standings back; the optimiser follows when the Trainer has prepared it."""
        loaded = Checkpoint.read(Path(resume_from_checkpoint))
        unpack_run(self.run, loaded)
        self._sums.copy_(loaded.tensors["loss_sums"])
        self._summed = list(loaded.state["summed"])
        self._loaded = loaded

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._loaded is not None:
            unpack_optimizer(self.optimizer, self._loaded.under("optimizer"), self._loaded.state["groups"])
            self.lr_scheduler.load_state_dict(self._loaded.state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._loaded is not None:
            generators = self._loaded.state["random"]
            set_random_state(generators[self.args.process_index % len(generators)], self.args.device)

    @property
    def median_step(self) -> float:
        """Median seconds of an optimiser step, without evaluations."""
        return median(self.step_seconds) if self.step_seconds else 0.0


class _Keeper(TrainerCallback):
    """Calls the trainer back at the events of a step."""

    def __init__(self, trainer: MixedTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.clip()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.step_ended()
