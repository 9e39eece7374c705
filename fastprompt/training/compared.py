"""The lines of a run's comparison: one for every prompt, one for every other way; each is learned once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprompt.training.comparators import Comparator
from fastprompt.training.comparison import Comparison, compare, of_prompt
from fastprompt.training.config.build import load_backbone
from fastprompt.training.files import append_line, dumps, main_process, read_lines
from fastprompt.training.fingerprint import fingerprint
from fastprompt.training.items import make_items
from fastprompt.training.prepare import describe

if TYPE_CHECKING:
    from fastprompt.training.launch import Launch
    from fastprompt.training.result import Listener

KEPT = "comparison.jsonl"


class Kept:
    """Lines that are finished, in a file beside the prompts, from which a run that goes on takes them."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.lines = {line["key"]: line["line"] for line in read_lines(path)} if resume else {}
        if not resume and main_process():
            path.unlink(missing_ok=True)

    def line(self, about: Mapping[str, Any], learn: Callable[[], Comparison]) -> Comparison:
        """The line of what `about` describes in full: as it was found before, or learned now."""
        key = hashlib.sha256(dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        if key in self.lines:
            return Comparison(**self.lines[key])
        found = learn()
        if main_process():
            append_line(self.path, {"key": key, "line": asdict(found)})
        return found


def compared(launch: Launch, report: Mapping[str, Any], kept: Kept, listen: Listener | None) -> Iterator[Comparison]:
    """A line for every prompt of a `report`, and for every other way to learn its task."""
    config, model, jobs, options = launch.config, launch.model, launch.jobs, launch.options["options"]
    items = [make_items(model, job)[0] for job in jobs]
    common = {"backbone": fingerprint(model.backbone)["weights"], "run": config.run.model_dump(exclude={"output"})}
    for job, made, row in zip(jobs, items, report["prompts"], strict=True):
        about = {"prompt": describe(job, made), "score": row["score"], "steps": row["steps"]}
        yield kept.line(common | about, partial(of_prompt, model, job, row, options))
    model.to("meta")  # its memory is not to count among the others'
    for table in config.comparators:
        comparator, done = Comparator(**table.model_dump(exclude={"prompts"})), []
        for entry, job, made in zip(config.prompts, jobs, items, strict=True):
            same = (entry.task, entry.data, comparator.lesson(job))
            if same in done or (table.prompts is not None and job.name not in table.prompts):
                continue  # prompts by several methods learn the same: the other way does it once
            done.append(same)
            outputs = job.task.num_labels()
            changes = {"dtype": torch.float32} | ({} if outputs is None else {"num_labels": outputs})
            learn = partial(
                compare,
                comparator,
                job,
                made,
                partial(load_backbone, config, **changes),
                causal=model._info.spec.causal,
                options=options,
                eval_batch_size=config.run.evaluation_rows,
                seed=config.run.seed,
                listen=listen,
            )
            yield kept.line(common | {"way": asdict(comparator), "job": describe(comparator.job(job), made)}, learn)
