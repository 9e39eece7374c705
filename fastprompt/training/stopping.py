"""How each job stands: its scores, its best prompt, and whether it has stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from fastprompt.errors import ArgumentError
from fastprompt.training.job import Job

FINISHED, PATIENCE, PRUNED, DIVERGED = "finished", "patience", "pruned", "diverged"


@dataclass
class JobState:
    """What is known of a job so far; it goes into checkpoints.

    `history` has a {"step", "scores"} for every evaluation, `losses` a (step, mean loss since the one before).
    `stopped` is None while the job trains, then "finished", "patience", "pruned" or "diverged", at `stopped_at`.
    """

    name: str
    metric: str
    best_score: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations since the best one
    stopped: str | None = None
    stopped_at: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.stopped is None

    def scores_at(self, step: int | None) -> dict[str, float]:
        """The scores found after `step`, none if it was not evaluated there."""
        return next((entry["scores"] for entry in self.history if entry["step"] == step), {})

    def stop(self, reason: str, step: int) -> None:
        """The job trains no more, unless it had stopped before."""
        if self.stopped is None:
            self.stopped, self.stopped_at = reason, step

    def record(self, job: Job, step: int, scores: Mapping[str, float]) -> bool:
        """Take in an evaluation; True if it is the best so far. Stops the job when its patience is at an end."""
        if self.metric not in scores:
            raise ArgumentError(
                f"job {self.name!r}: metric is {self.metric!r}, expected one of {', '.join(map(repr, scores))}"
            )
        self.history.append({"step": step, "scores": dict(scores)})
        found = scores[self.metric]
        better = math.isfinite(found) and (self.best_score is None or found > self.best_score)
        if better:
            self.best_score, self.best_step, self.worse = found, step, 0
        else:
            self.worse += 1
            if job.patience is not None and self.worse >= job.patience:
                self.stop(PATIENCE, step)
        return better

    def to_dict(self) -> dict[str, Any]:
        """The state in JSON types; inverse of `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> JobState:
        state = JobState(**{f.name: values[f.name] for f in fields(JobState)})
        state.losses = [(int(step), _number(loss)) for step, loss in state.losses]
        state.history = [
            {**entry, "scores": {k: _number(v) for k, v in entry["scores"].items()}} for entry in state.history
        ]
        return state


def _number(value: float | None) -> float:
    """A number that strict JSON kept; what was not finite came back as null."""
    return math.nan if value is None else float(value)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the module's tensors, on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in module.state_dict().items()}
