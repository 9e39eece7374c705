"""Candidates: what each prompt becomes under every combination of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from fastprompt.errors import ArgumentError, FastPromptError, TrainingError
from fastprompt.prompts import METHODS, PromptConfig
from fastprompt.training.job import Job
from fastprompt.training.sweep.space import Range, combinations

if TYPE_CHECKING:
    from fastprompt.training.config import RunConfig
    from fastprompt.training.config.build import Examples

NEVER_SWEPT = ("name", "task", "train", "validation", "data", "metric", "config", "shares", "init_from", "template")


@dataclass(frozen=True)
class Candidate:
    """A job to try: `base` names the prompt that it would be, `values` what was chosen for it."""

    job: Job
    base: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.job.name


def expand(
    jobs: Sequence[Job],
    space: Mapping[str, Sequence[Any] | Range],
    *,
    search: str = "grid",
    candidates: int = 16,
    seed: int = 0,
) -> list[Candidate]:
    """Every job under every combination, each different one once.

    Keys of `space` are "method", fields of a method's config, and fields of `Job`; a value that a candidate's method
    does not have is left out. Errors: TrainingError with every combination that cannot be.
    """
    found: list[Candidate] = []
    problems: list[str] = []
    for job in jobs:
        made: dict[Any, Candidate] = {}
        for values in combinations(space, search=search, candidates=candidates, seed=f"{seed}/{job.name}"):
            try:
                chosen, kept = _changed(job, values)
            except FastPromptError as error:
                problems.append(f"job {job.name!r} with {values}: {error}")
                continue
            key = repr([getattr(chosen, f.name) for f in fields(Job) if f.name not in ("name", "train", "validation")])
            name = f"{job.name}-{len(made)}"
            made.setdefault(key, Candidate(replace(chosen, name=name), job.name, kept))
        found += made.values()
    if problems:
        raise TrainingError(list(dict.fromkeys(problems)))
    return found


def _changed(job: Job, values: Mapping[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with these values, and those of them that it has a place for."""
    if job.config is None:
        raise ArgumentError("config is None, expected the config of the prompt to try other values of")
    own = {f.name for f in fields(Job)} - set(NEVER_SWEPT)
    known = own.union({"method"}, *(config_fields(cls) for cls in METHODS.values()))
    if unknown := sorted(set(values) - known):
        raise ArgumentError(f"space has {unknown}, expected keys among {', '.join(sorted(known))}")
    method = values.get("method", job.config.method)
    if method not in METHODS:
        raise ArgumentError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    of_method = config_fields(METHODS[method])
    config = {k: v for k, v in job.config.to_dict().items() if k in of_method}
    config |= {k: v for k, v in values.items() if k in of_method}
    changes = {k: v for k, v in values.items() if k in own and k not in of_method}
    for length, other in (("epochs", "steps"), ("steps", "epochs")):
        if length in changes:
            changes.setdefault(other, None)
    if "in_place" not in of_method:
        changes["template"] = None  # it says where virtual tokens stand, and theirs stand before the text
    kept = {k: v for k, v in values.items() if k in of_method or k in own or k == "method"}
    return replace(job, config=METHODS[method].from_dict(config), **changes), kept


def config_fields(cls: type[PromptConfig]) -> frozenset[str]:
    """Names of a method's fields."""
    return frozenset(f.name for f in fields(cls))


def from_config(config: RunConfig, examples: Sequence[Examples]) -> list[Candidate]:
    """The candidates of a config file that was loaded for a sweep."""
    from fastprompt.training.config.build import job_of

    found = []
    for index, name, values, entry in config.candidates:
        job = job_of(config, entry, examples[index])
        found.append(Candidate(replace(job, name=name), config.prompts[index].name, values))
    return found


def named(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    """Candidates by name."""
    return {candidate.name: candidate for candidate in candidates}
