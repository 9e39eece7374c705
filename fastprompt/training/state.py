"""What one training run works on, and how it stands."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import ArgumentError
from fastprompt.model import PromptedModel
from fastprompt.prompts import SoftPrompt
from fastprompt.store import save_prompt
from fastprompt.training.collate import Collator
from fastprompt.training.files import json_types
from fastprompt.training.job import Job
from fastprompt.training.mixture import Mixture
from fastprompt.training.result import Listener, Pruner
from fastprompt.training.stopping import JobState
from fastprompt.training.tasks.base import Item


@dataclass
class Run:
    """Everything one training run works on; lists go by the jobs' numbers.

    `best[j]` is a copy of the prompt that scored best (none where `keeps_best` is False), `validation[j]` the items it
    is scored on; `digests[j]` tells whether a checkpoint belongs to this job, `backbone` whether it does to this
    backbone. `output` is None where nothing is to be written. `first_draws[j]` is the draw of its dropout with which
    prompt j began.
    """

    model: PromptedModel
    jobs: Sequence[Job]
    mixture: Mixture
    collator: Collator
    validation: Sequence[Sequence[Item]]
    digests: Sequence[Mapping[str, Any]]
    eval_rows: int
    backbone: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    listen: Listener | None = None
    prune: Pruner | None = None
    keeps_best: bool = True
    states: list[JobState] = field(default_factory=list)
    best: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    first_draws: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.states = [JobState(job.name, job.best_metric) for job in self.jobs]
        self.first_draws = [prompt.noise.draws for prompt in self.prompts]
        numbers = {job.name: j for j, job in enumerate(self.jobs)}
        self._owners = [j if job.shares is None else numbers[job.shares] for j, job in enumerate(self.jobs)]

    @property
    def prompts(self) -> list[SoftPrompt]:
        return [self.model.library[job.name] for job in self.jobs]

    def stop(self, j: int, reason: str, step: int) -> None:
        """The job draws no more rows."""
        self.states[j].stop(reason, step)
        self.mixture.stopped.add(j)

    def set_draws(self, jobs: Iterable[int], step: int) -> None:
        """Let the dropout of these jobs' prompts draw what belongs to optimiser step `step`.

        So it is the same in every pass and process of a step, and however a step is cut.
        """
        for j in {self._owners[j] for j in jobs}:
            self.model.library[self.jobs[j].name].noise.draws = self.first_draws[j] + step

    @torch.no_grad()
    def is_finite(self, j: int) -> bool:
        """Whether the parameters of a prompt, and the keys and values that they become, are finite numbers."""
        prompt, library = self.prompts[j], self.model.library
        if not all(p.isfinite().all() for p in prompt.parameters()):
            return False
        becomes_prefix = isinstance(prompt, SoftPrompt) and (
            prompt.kind == "prefix" or (self.model._info.compiles and not prompt.in_place)
        )
        try:
            if becomes_prefix:
                with library.prefix_batch([library.source(self.jobs[j].name)]):  # where an evaluation finds it then
                    pass
        except ArgumentError:
            return False
        return True

    def load_best(self) -> None:
        """Put the prompts that scored best into the model.

        Jobs that share virtual tokens each get tokens of their own, unless the same ones are the best of all of them.
        """
        for j, job in enumerate(self.jobs):
            sharers = [k for k, other in enumerate(self.jobs) if other.shares == job.name]
            if not _same_tokens([self.best.get(k) for k in (j, *sharers)]):
                for k in sharers:
                    self._part(k)
        prompts = self.prompts
        for j, best in self.best.items():
            prompts[j].load_state_dict(best)

    def _part(self, j: int) -> None:
        """Give a job that shares another's virtual tokens a copy of them."""
        name = self.jobs[j].name
        shared = self.model.remove_prompt(name)
        own = type(shared)(shared.config, shared.spec, copy.deepcopy(shared.encoder))
        own.head, own.labels, own.task_type = shared.head, shared.labels, shared.task_type
        self.model.add_prompt(name, own)

    def save_prompt(self, j: int, kind: str, step: int) -> None:
        """Write a prompt as it is now to the output folder `kind`, with a record of its training.

        A prompt that has diverged to infinity is not written.
        """
        assert self.output is not None
        job, state = self.jobs[j], self.states[j]
        if not all(p.isfinite().all() for p in self.prompts[j].parameters()):
            warnings.warn(f"prompt {job.name!r} has weights that are not finite and is not saved", stacklevel=2)
            return
        record = {
            "training": {
                "step": step,
                "scores": state.scores_at(step),
                "metric": state.metric,
                "examples": len(self.mixture.streams[j].items),
                "validation_examples": 0 if job.validation is None else len(job.validation),
                **self.digests[j],
            }
        }
        save_prompt(self.output / kind / job.name, self.prompts[j], record=json_types(record), overwrite=True)


def _same_tokens(states: Sequence[Mapping[str, torch.Tensor] | None]) -> bool:
    """Whether these states of prompts, None where a job has no best one, have the same virtual tokens."""
    tokens = [{k: t for k, t in (state or {}).items() if k.startswith("encoder.")} for state in states]
    return all(
        one.keys() == tokens[0].keys() and all(torch.equal(t, tokens[0][k]) for k, t in one.items()) for one in tokens
    )
