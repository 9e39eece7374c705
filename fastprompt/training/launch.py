"""A run from its config file: everything read and checked, trained, and written down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastprompt
from fastprompt.errors import ArgumentError, TrainingError
from fastprompt.model import PromptedModel
from fastprompt.prompts.init import seeded
from fastprompt.training.config import RunConfig, load_config
from fastprompt.training.config.build import Examples, job_of, load_backbone, load_examples, train_options
from fastprompt.training.config.tables import PromptTable
from fastprompt.training.files import json_types, main_process, write_json
from fastprompt.training.items import counted, made_once
from fastprompt.training.job import Job

if TYPE_CHECKING:
    from fastprompt.training.result import JobResult, Listener, TrainResult
    from fastprompt.training.sweep.candidates import Candidate
    from fastprompt.training.sweep.halving import Halving
    from fastprompt.training.sweep.run import SweepListener, SweepResult

RESULTS = "results.json"
_JOB = re.compile(r"job '([^']*)': (.*)", re.DOTALL)


@dataclass(frozen=True)
class Launch:
    """What a config file gives: a model without prompts, a job a prompt, keywords of `train`."""

    config: RunConfig
    model: PromptedModel
    jobs: tuple[Job, ...]
    options: dict[str, Any]

    @property
    def output(self) -> Path:
        """Where results go: what the file says, relative to it, or a folder named as the file, here."""
        named, path = self.config.run.output, self.config.path
        return Path(f"{path.stem}-run") if named is None else path.parent / Path(named).expanduser()


def prepare_launch(config: RunConfig) -> Launch:
    """Load backbone, tokenizer and data."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    examples = load_examples(config)
    jobs = tuple(job_of(config, entry, data) for entry, data in zip(config.prompts, examples, strict=True))
    with seeded(config.run.seed):  # weights that its files lack are the same when the run goes on
        backbone, tokenizer = load_backbone(config)
    return Launch(config, PromptedModel(backbone, tokenizer), jobs, train_options(config))


def check_launch(launch: Launch) -> list[Job]:
    """Check what can only be checked with backbone and data at hand, and leave the model as it was.

    Returns the jobs with their length in steps. Errors: ConfigError with all problems, each at the line of its prompt.
    """
    from fastprompt.training import prepare

    with _placed(launch.config), made_once():
        prepare.check(launch.model, launch.jobs, launch.options["options"])
        return [counted(launch.model, job) for job in launch.jobs]


def check_sweep(launch: Launch, candidates: Sequence[Candidate]) -> None:
    """The same for the candidates of a sweep."""
    from fastprompt.training.sweep.run import check_candidates

    with made_once():
        _check_rungs(launch, candidates)
        with _placed(launch.config):
            check_candidates(launch.model, candidates, launch.options)


@contextmanager
def _placed(config: RunConfig) -> Iterator[None]:
    """Problems that training finds in the block become those of the file."""
    try:
        yield
    except TrainingError as error:
        raise_placed(config, error.problems)
        raise


def raise_placed(config: RunConfig, found: Sequence[str]) -> None:
    """Raise problems that training found, each with the line of the prompt that it names."""
    names = [entry.name for entry in config.prompts]
    problems = config.problems()
    for text in found:
        named = _JOB.fullmatch(text)
        if named and named[1] in names:
            source = config.sources[names.index(named[1])]
            part, _, rest = named[2].partition(": ")
            if part in ("train", "validation"):
                problems.add(source.origin(("data", part)), rest)
            else:
                key = part.partition(" ")[0]  # a problem begins with the key that it is about, if there is one
                problems.add(source.origin((key if key in PromptTable.model_fields else "name",)), named[2])
        else:
            problems.add(("run", "output"), text)
    problems.raise_all()


def train_file(
    path: str | Path | RunConfig,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Train what a config file describes; returns what `results.json` in the output folder holds.

    Args:
        path: the file, or what `load_config` made of it.
        overrides: `key=value` in place of what the file says.
        output: folder for prompts, checkpoints and results, in place of the file's.
        resume, overwrite, listen: as in `train`; resumed, what was compared already is not learned again.
    Errors: ConfigError with every problem, before any training.
    """
    from fastprompt.training.run import train

    config = path if isinstance(path, RunConfig) else load_config(path, overrides)
    launch = prepare_launch(config)
    folder = launch.output if output is None else Path(output)
    with _placed(config):
        result = train(
            launch.model,
            launch.jobs,
            output_dir=folder,
            resume=resume,
            overwrite=overwrite,
            listen=listen,
            **launch.options,
        )
    report = train_report(launch, result, folder)
    write_json(folder / RESULTS, report)
    if config.comparators:
        from fastprompt.training.compared import KEPT, Kept, compared

        kept = Kept(folder / KEPT, resume=resume)
        report["comparison"] = [asdict(line) for line in compared(launch, report, kept, listen)]
        write_json(folder / RESULTS, report)
    return json_types(report)


def prepare_sweep(path: str | Path | RunConfig, overrides: Sequence[str] = ()) -> tuple[Launch, list[Candidate]]:
    """Load what a config file with a `[sweep]` names, and make its candidates."""
    from fastprompt.training.sweep.candidates import from_config

    config = path if isinstance(path, RunConfig) else load_config(path, overrides, sweep=True)
    launch = prepare_launch(config)
    examples = [Examples(job.train, job.validation) for job in launch.jobs]
    return launch, from_config(config, examples)


def sweep_file(
    path: str | Path | RunConfig,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    listen: SweepListener | None = None,
) -> SweepResult:
    """Sweep as a config file says, into `sweep.jsonl` and `best/` of the output folder; arguments as in `train_file`.

    `resume` goes on with the sweep in the folder: candidates that have a result are not trained again.
    """
    from fastprompt.training.sweep.run import run_candidates

    launch, candidates = prepare_sweep(path, overrides)
    table = launch.config.sweep
    assert table is not None
    with made_once():
        halving = _check_rungs(launch, candidates)
        with _placed(launch.config):
            return run_candidates(
                launch.model,
                candidates,
                launch.output if output is None else Path(output),
                halving=halving,
                max_prompts_per_run=table.max_prompts_per_run,
                memory=None if table.memory is None else int(table.memory * 2**30),
                resume=resume,
                overwrite=overwrite,
                listen=listen,
                options=launch.options,
            )


def _check_rungs(launch: Launch, candidates: Sequence[Candidate]) -> Halving:
    """The sweep's halving; a ConfigError if a candidate has too few steps for it."""
    from fastprompt.training.sweep.halving import Halving

    table, problems = launch.config.sweep, launch.config.problems()
    assert table is not None
    halving = Halving(table.eta, table.rungs)
    for candidate in candidates:
        try:
            halving.prepared(counted(launch.model, candidate.job))
        except ArgumentError as error:
            problems.add(("sweep", "rungs"), str(error))
    problems.raise_all()
    return halving


def train_report(launch: Launch, result: TrainResult, folder: Path) -> dict[str, Any]:
    """What a run found, in JSON types."""
    rows = [_row(launch, job, result.jobs[job.name], folder) for job in launch.jobs]
    run = {k: v for k, v in asdict(result).items() if k != "jobs"}
    return {
        "fastprompt": fastprompt.__version__,
        "config": str(launch.config.path),
        "backbone": launch.config.run.backbone,
        "backbone_parameters": launch.model.backbone.num_parameters(),
        "run": run,
        "prompts": rows,
        "comparison": [],
    }


def _row(launch: Launch, job: Job, result: JobResult, folder: Path) -> dict[str, Any]:
    prompt = launch.model.library[job.name]
    best = folder / ("best" if result.best_step is not None else "prompts") / job.name
    return {
        "name": job.name,
        "method": prompt.config.method,
        "task": job.task.name,
        "virtual_tokens": prompt.length,
        "metric": job.best_metric,
        "score": result.best_score,
        **asdict(result),
        "folder": str(best),
        "stored_bytes": _stored(best) if main_process() else None,
    }


def _stored(folder: Path) -> int | None:
    """Bytes of a prompt's files; None for one that is not finite and was not saved."""
    return sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else None
