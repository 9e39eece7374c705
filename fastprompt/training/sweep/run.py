"""Candidates trained in as few runs as memory allows, losers dropped on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import TrainingError, UnsupportedError
from fastprompt.model import PromptedModel
from fastprompt.prompts.base import check_int
from fastprompt.training import prepare
from fastprompt.training.files import json_types
from fastprompt.training.fingerprint import fingerprint
from fastprompt.training.items import counted, made_once
from fastprompt.training.job import Job
from fastprompt.training.result import JobResult, Progress
from fastprompt.training.run import train
from fastprompt.training.sweep import journal as journals
from fastprompt.training.sweep.candidates import Candidate, expand, named
from fastprompt.training.sweep.halving import Halving, Ranking
from fastprompt.training.sweep.journal import Journal
from fastprompt.training.sweep.packing import measure, packs
from fastprompt.training.sweep.seeds import over_seeds
from fastprompt.training.sweep.space import Range

BEST = "best"


@dataclass(frozen=True)
class SweepProgress:
    """How a sweep stands: which run of how many, candidates with a result and in all, and the run itself."""

    run: int
    runs: int
    done: int
    candidates: int
    progress: Progress


SweepListener = Callable[[SweepProgress], None]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found: a result for every candidate, in order; and by prompt the best of them.

    `seeds` has the mean and the spread of settings that differ in the seed only, as `over_seeds` gives them.
    """

    output: Path
    results: list[dict[str, Any]]
    best: dict[str, dict[str, Any]]
    seeds: list[dict[str, Any]]


def sweep(
    model: PromptedModel,
    jobs: Sequence[Job],
    space: Mapping[str, Sequence[Any] | Range],
    *,
    output_dir: str | Path,
    search: str = "grid",
    candidates: int = 16,
    seed: int = 0,
    eta: int = 3,
    rungs: int = 0,
    max_prompts_per_run: int | None = None,
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listen: SweepListener | None = None,
    **options: Any,
) -> SweepResult:
    """Train every job under every combination of values, many at once, and keep the best of each.

    Semantics:
        sweep(model, [job], {"num_virtual_tokens": [4, 16], "learning_rate": Range(1e-3, 1, log=True, points=4)}, ...)
        # output_dir/sweep.jsonl has all results, output_dir/best/NAME the best prompt of each job

    Args:
        space: key -> values, or a `Range`; keys are "method", fields of the methods' configs, and fields of `Job`.
        search, candidates, seed: "grid" takes all combinations, "random" so many of each job.
        eta, rungs: successive halving, see `Halving`; no rungs: nobody is dropped.
        max_prompts_per_run: candidates trained together; None measures what fits into `memory` bytes (None: into what
            is free).
        resume: go on with the sweep in `output_dir`; candidates that have a result are not trained again.
        overwrite: start anew there. listen: told of every step.
        options: further keywords of `train`.
    """
    found = expand(jobs, space, search=search, candidates=candidates, seed=seed)
    return run_candidates(
        model,
        found,
        Path(output_dir),
        halving=Halving(eta, rungs),
        max_prompts_per_run=max_prompts_per_run,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
        listen=listen,
        options=options,
    )


def run_candidates(
    model: PromptedModel,
    candidates: Sequence[Candidate],
    output: Path,
    *,
    halving: Halving,
    max_prompts_per_run: int | None = None,
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listen: SweepListener | None = None,
    options: Mapping[str, Any],
) -> SweepResult:
    """`sweep` for candidates that are made already."""
    if torch.distributed.is_torchelastic_launched():
        raise UnsupportedError("a sweep runs in one process: start it without torchrun, or one sweep a device")
    if max_prompts_per_run is not None:
        check_int("max_prompts_per_run", max_prompts_per_run, 1)
    with made_once():
        check_candidates(model, candidates, options)
        ready = [replace(c, job=halving.prepared(counted(model, c.job))) for c in candidates]
        backbone = fingerprint(model.backbone)
        journal = Journal.open(output, ready, backbone, resume=resume, overwrite=overwrite)
        running = _Runs(model, named(ready), journal, halving, listen, dict(options))
        began = list(journals.unfinished(journal))
        begun = {name for line in journal.of(journals.RUN) for name in line["candidates"]}
        left = [c for c in ready if c.name not in begun]
        size = max_prompts_per_run or (_room(model, left, memory, journal, options) if left else 1)
        number = 1 + max((line["run"] for line in journal.of(journals.RUN)), default=-1)
        fresh = [(number + i, [c.name for c in pack]) for i, pack in enumerate(packs(left, size))]
        for i, (run, names) in enumerate([*began, *fresh]):
            running.train(run, names, i, len(began) + len(fresh))
    return _found(output, ready, journal)


def _found(output: Path, candidates: Sequence[Candidate], journal: Journal) -> SweepResult:
    """What the journal of a sweep that is done says; its last line tells of settings tried with several seeds."""
    known = journal.results()
    results = [known[c.name] for c in candidates]
    seeds = over_seeds(results)
    if seeds and not journal.of(journals.SEEDS):
        journal.write(journals.SEEDS, settings=seeds)
    bases = dict.fromkeys(c.base for c in candidates)
    best = {base: best for base in bases if (best := journal.best(base)) is not None}
    return SweepResult(output, results, best, seeds)


def check_candidates(model: PromptedModel, candidates: Sequence[Candidate], options: Mapping[str, Any]) -> None:
    """Raise a TrainingError with everything that keeps a candidate from training; the model stays as it is.

    `options` are keywords of `train`. Prompts are made one after the other, so that all need not fit at once.
    """
    problems = [] if candidates else ["there are no candidates: expected at least one job and one value"]
    with made_once():
        for candidate in candidates:
            if candidate.job.validation is None:
                problems.append(
                    f"job {candidate.base!r}: validation is None, expected examples: a sweep chooses by its score"
                )
            try:
                prepare.check(model, [candidate.job], options.get("options"))
            except TrainingError as error:
                problems += [_of_base(text, candidate) for text in error.problems]
    prepare.raise_problems(list(dict.fromkeys(problems)))


def _room(
    model: PromptedModel, left: Sequence[Candidate], memory: int | None, journal: Journal, options: Mapping[str, Any]
) -> int:
    """How many candidates a run takes, measured once a sweep."""
    if former := journal.of(journals.MEMORY):
        return former[-1]["fits"]
    room = measure(model, left, memory, {k: v for k, v in options.items() if k != "save_every"})
    journal.write(journals.MEMORY, **asdict(room))
    return room.fits


class _Runs:
    """Trains runs of candidates and writes down what becomes of them."""

    def __init__(
        self,
        model: PromptedModel,
        candidates: Mapping[str, Candidate],
        journal: Journal,
        halving: Halving,
        listen: SweepListener | None,
        options: dict[str, Any],
    ) -> None:
        self.model, self.candidates, self.journal = model, candidates, journal
        self.listen, self.options = listen, options
        self.ranking = Ranking(halving, candidates)
        for line in journal.of(journals.EVALUATION):
            self.ranking.record(line["candidate"], line["step"], line["best"])

    def train(self, run: int, names: Sequence[str], place: int, runs: int) -> None:
        """Train one run, or what is left of it, and forget its prompts but the best."""
        taken = [self.candidates[name] for name in names]
        self.journal.write(journals.RUN, run=run, candidates=list(names))
        folder = self.journal.path.parent / f"run-{run}" if self.options.get("save_every") else None

        def tell(progress: Progress) -> None:
            if progress.evaluated:
                self._evaluated(run, progress)
            if self.listen is not None:
                done = len(self.journal.results())
                self.listen(SweepProgress(place, runs, done, len(self.candidates), progress))

        result = train(
            self.model,
            [candidate.job for candidate in taken],
            output_dir=folder,
            resume=folder is not None,
            listen=tell,
            prune=self.ranking,
            **self.options,
        )
        for candidate in taken:
            self._finished(run, candidate, result.jobs[candidate.name])
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _evaluated(self, run: int, progress: Progress) -> None:
        for name, state in progress.states.items():
            if state.history and state.history[-1]["step"] == progress.step:
                self.journal.write(
                    journals.EVALUATION,
                    run=run,
                    candidate=name,
                    step=progress.step,
                    scores=state.history[-1]["scores"],
                    best=state.best_score,
                )

    def _finished(self, run: int, candidate: Candidate, result: JobResult) -> None:
        """Write a result down, after its prompt if that is the best so far."""
        prompt = self.model.library[candidate.name]
        record = {
            "run": run,
            "base": candidate.base,
            "values": dict(candidate.values),
            "method": prompt.config.method,
            "virtual_tokens": prompt.length,
            "metric": candidate.job.best_metric,
            **{k: v for k, v in asdict(result).items() if k != "losses"},
        }
        former = self.journal.best(candidate.base)
        if result.best_score is not None and (former is None or result.best_score > former["best_score"]):
            prompt.record = {"sweep": json_types(record)}
            self.model.save_prompt(candidate.name, self.journal.path.parent / BEST / candidate.base, overwrite=True)
        self.journal.write(journals.CANDIDATE, **record)
        self.model.remove_prompt(candidate.name)


def _of_base(text: str, candidate: Candidate) -> str:
    """A problem of a candidate as one of the prompt that it was made from."""
    own = f"job {candidate.name!r}: "
    return f"job {candidate.base!r}: {text.removeprefix(own)}" if text.startswith(own) else text
