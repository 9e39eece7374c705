"""One prompt to train: its task, its data, its method and how it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastprompt.errors import ArgumentError
from fastprompt.folders import check_name
from fastprompt.prompts import PromptConfig
from fastprompt.prompts.base import check_choice, check_float, check_int
from fastprompt.training.tasks.base import Examples, Task

SCHEDULES = ("linear", "constant", "cosine")
_INFINITY = float("inf")
_LARGEST = 1e6  # no rate, decay or norm is that large: more is a slip, and would overflow


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt to train, alone or in one run with others: what it learns is the same.

    Args:
        name: the prompt's name in the model.
        task, train, validation: what it learns, from which examples, and on which it is scored.
        config: a fresh prompt's method; None for a prompt that the model has already, or with `shares`.
        learning_rate, weight_decay, schedule, warmup: AdamW's; `schedule` is "linear" (falling to zero), "cosine" or
            "constant", behind `warmup` optimiser steps (an int) or share of all steps (a float) that rise linearly.
        head_learning_rate: the head's own; None: `learning_rate`.
        batch_size: examples of this job in an optimiser step, over all processes and accumulated passes.
        epochs, steps: how long it trains; exactly one of them. A step has `batch_size` examples, always; an epoch has
            those that the task does not leave out.
        max_grad_norm: bound on the norm of this prompt's gradient (with its head's); None: no bound.
        evaluate_every: optimiser steps between evaluations; None: once an epoch. The last step is evaluated anyway.
        patience: evaluations without a better score after which the job stops; None: never.
        metric: the score that says which prompt is best; None: the task's own.
        seed: of the init and of the order of examples.
        init_from: transfer: start from this prompt of the model, or from a prompt's folder.
        shares: multi-task: train the virtual tokens of the job of this name, with a head and data of this job's own.
            Rates, clipping and regularisation of the virtual tokens are that job's.
        template: for in-place prompts.
        max_length: the most tokens of a text: its special tokens count, virtual tokens and the answer behind it do
            not. A longer text is cut, at the end unless the task's `truncate` says "start". None: a text that the
            backbone has no positions for is cut if the task has `truncate`, and else a problem.
    """

    name: str
    task: Task
    train: Examples
    validation: Examples | None = None
    config: PromptConfig | None = None
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup: float | int = 0
    head_learning_rate: float | None = None
    batch_size: int = 16
    epochs: float | None = None
    steps: int | None = None
    max_grad_norm: float | None = 1.0
    evaluate_every: int | None = None
    patience: int | None = None
    metric: str | None = None
    seed: int = 0
    init_from: str | None = None
    shares: str | None = None
    template: Any = None
    max_length: int | None = None

    @property
    def best_metric(self) -> str:
        """The score that says which prompt is best."""
        return self.metric or self.task.metric

    def problems(self) -> list[str]:
        """Everything that is wrong with this job by itself, one sentence each."""
        found: list[str] = []

        def check(function: Callable[..., object], *arguments: object) -> None:
            try:
                function(*arguments)
            except ArgumentError as error:
                found.append(str(error))

        try:
            check_name(self.name)
        except ValueError as error:
            found.append(str(error))
        for name in ("learning_rate", "weight_decay", "head_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None or name in ("learning_rate", "weight_decay"):
                check(check_float, name, value, 0.0, _LARGEST)
        for name in ("batch_size", "steps", "evaluate_every", "patience", "max_length"):
            if getattr(self, name) is not None or name == "batch_size":
                check(check_int, name, getattr(self, name), 1)
        check(check_choice, "schedule", self.schedule, SCHEDULES)
        check(check_int, "seed", self.seed, 0)
        if isinstance(self.warmup, float):
            check(check_float, "warmup", self.warmup, 0.0, 1.0)
        else:
            check(check_int, "warmup", self.warmup, 0)
        if (self.epochs is None) == (self.steps is None):
            found.append(f"epochs is {self.epochs} and steps is {self.steps}, expected exactly one of them")
        if self.epochs is not None and not (isinstance(self.epochs, (int, float)) and 0 < self.epochs < _INFINITY):
            found.append(f"epochs is {self.epochs!r}, expected a number above 0")
        return found + self._contradictions()

    def _contradictions(self) -> list[str]:
        found = []
        if not isinstance(self.task, Task):
            found.append(f"task is {type(self.task).__name__}, expected a Task of fastprompt.training.tasks")
        if self.config is not None and not isinstance(self.config, PromptConfig):
            found.append(f"config is {type(self.config).__name__}, expected a prompt config: PTuningV2(...), say")
        if self.shares is not None and (self.config is not None or self.init_from is not None):
            found.append(f"shares is {self.shares!r}, so config and init_from come from that job: leave them out")
        if self.patience is not None and self.validation is None:
            found.append("patience needs validation examples to tell whether the prompt still gets better")
        return found

    def counted(self, examples: int) -> Job:
        """The same job with its length and its evaluations in steps, for so many examples that it trains on."""
        steps, every = self.steps, self.evaluate_every
        if steps is None:
            assert self.epochs is not None
            steps = max(1, -(-round(self.epochs * examples) // self.batch_size))
        every = every or max(1, round(examples / self.batch_size))
        return replace(self, epochs=None, steps=steps, evaluate_every=every)

    def total_steps(self) -> int:
        """Optimiser steps this job trains for, unless it stops early; epochs here count all examples of `train`.

        A run counts those that the task does not leave out: its jobs are `counted`.
        """
        return self.steps if self.steps is not None else self.counted(len(self.train)).total_steps()

    def evaluates_at(self, step: int) -> bool:
        """Whether the job is scored after `step` optimiser steps."""
        if self.validation is None:
            return False
        every = self.evaluate_every or self.counted(len(self.train)).evaluate_every
        assert every is not None
        return step == self.total_steps() or (step < self.total_steps() and step % every == 0)
