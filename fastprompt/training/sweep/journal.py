"""The results file of a sweep: JSON lines, appended as things happen, from which a sweep goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprompt.errors import TrainingError
from fastprompt.training.files import append_line, json_types, read_lines
from fastprompt.training.fingerprint import other_backbone
from fastprompt.training.sweep.candidates import Candidate

NAME = "sweep.jsonl"
SWEEP, MEMORY, RUN, EVALUATION, CANDIDATE, SEEDS = "sweep", "memory", "run", "evaluation", "candidate", "seeds"


@dataclass
class Journal:
    """What has happened in a sweep so far; `lines` are those of the file at `path`."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def open(
        folder: Path, candidates: Sequence[Candidate], backbone: Mapping[str, str], *, resume: bool, overwrite: bool
    ) -> Journal:
        """The journal of these candidates in a folder, begun or taken up again; `backbone` is its `fingerprint`.

        Errors: TrainingError if the folder holds a sweep and neither `resume` nor `overwrite` is given, or another
        sweep than this one, or one over another backbone.
        """
        path = folder / NAME
        if overwrite:
            path.unlink(missing_ok=True)
        journal = Journal(path, read_lines(path))
        digest = _digest(candidates)
        if not journal.lines:
            listed = [{"name": c.name, "base": c.base, "values": dict(c.values)} for c in candidates]
            journal.write(SWEEP, digest=digest, backbone=backbone, candidates=listed)
        elif not resume:
            raise TrainingError([f"{path} holds a sweep already: pass resume or overwrite, or another output folder"])
        elif journal.lines[0].get("digest") != digest:
            raise TrainingError(
                [f"{path} is of another sweep (other candidates or data): choose another output folder"]
            )
        elif other := other_backbone(journal.lines[0]["backbone"], backbone):
            raise TrainingError([f"{path} is of another sweep: {other}; choose another output folder"])
        return journal

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line."""
        line = json_types({"kind": kind, **fields})  # what a later reader finds
        append_line(self.path, line)
        self.lines.append(line)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """All lines of a kind, in the order they came."""
        return [line for line in self.lines if line["kind"] == kind]

    def results(self) -> dict[str, dict[str, Any]]:
        """The result of every candidate that has one."""
        return {line["name"]: line for line in self.of(CANDIDATE)}

    def best(self, base: str) -> dict[str, Any] | None:
        """The result that is best for a prompt; of equal ones the first."""
        scored = [line for line in self.of(CANDIDATE) if line["base"] == base and line["best_score"] is not None]
        return max(scored, key=lambda line: line["best_score"], default=None)


def unfinished(journal: Journal) -> Iterable[tuple[int, list[str]]]:
    """Runs that were begun and have candidates without a result: number, names of all its candidates."""
    done = journal.results()
    for line in {line["run"]: line for line in journal.of(RUN)}.values():
        if not set(line["candidates"]) <= set(done):
            yield line["run"], line["candidates"]


def _digest(candidates: Sequence[Candidate]) -> str:
    digest = hashlib.sha256()
    for candidate in candidates:
        job = candidate.job
        parts = [part for part in (job.train, job.validation) if part is not None and len(part)]
        data = [(len(part), part[0], part[-1]) for part in parts]
        fields = {k: v for k, v in vars(job).items() if k not in ("train", "validation")}
        digest.update(repr((candidate.base, fields, data)).encode())
    return digest.hexdigest()[:16]
