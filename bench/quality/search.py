"""How the settings for SNIPS were looked for: candidates trained in one run, scored on validation only.

    python -m bench quality-search --data FOLDER --out FILE

It may be stopped once the curves say enough; every line is written as it comes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastprompt as fp
from bench import machine
from bench.quality import encoder_part, settings
from bench.quality.backbone import Encoder, MissingWeights
from bench.quality.data import MissingData
from bench.quality.ledger import Ledger
from fastprompt import env
from fastprompt.training.data import load
from fastprompt.training.job import Job
from fastprompt.training.result import Progress
from fastprompt.training.run import train


@dataclass(frozen=True)
class Candidate:
    """What is varied: length, both learning rates, and the spread of the first numbers."""

    virtual_tokens: int
    learning_rate: float
    head_learning_rate: float
    init_std: float = 0.02

    @property
    def name(self) -> str:
        return f"p{self.virtual_tokens}-{self.learning_rate:g}-{self.head_learning_rate:g}-{self.init_std:g}"

    def job(self, subject: encoder_part.Subject, held: int, steps: int, evaluations: int) -> Job:
        config = fp.PTuningV2(num_virtual_tokens=self.virtual_tokens, init_std=self.init_std)
        return Job(
            name=self.name,
            task=subject.task,
            train=load(subject.train),
            validation=load(subject.other[:held]),
            config=config,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            batch_size=8,
            steps=steps,
            evaluate_every=max(1, steps // evaluations),
            schedule="cosine",
        )


GROUPS = {  # trained together; the second and third came of what the one before showed
    "rates": (
        Candidate(32, 1e-2, 1e-2),
        Candidate(32, 3e-2, 1e-2),
        Candidate(64, 1e-2, 1e-2),
        Candidate(16, 1e-2, 1e-2),
        Candidate(32, 5e-3, 5e-3),
        Candidate(32, 1e-2, 3e-3),
    ),
    "init": (
        Candidate(32, 3e-2, 3e-3),
        Candidate(32, 1e-1, 3e-3),
        Candidate(64, 3e-2, 3e-3),
        Candidate(32, 3e-2, 3e-3, 1.0),
        Candidate(32, 3e-2, 3e-3, 0.3),
        Candidate(32, 3e-2, 1e-3),
    ),
    "around": (
        Candidate(32, 3e-2, 3e-3, 0.3),
        Candidate(64, 3e-2, 3e-3, 0.3),
        Candidate(32, 3e-2, 1e-2, 0.3),
        Candidate(32, 3e-2, 1e-2, 0.1),
        Candidate(32, 6e-2, 1e-2, 0.3),
        Candidate(32, 1e-2, 5e-3, 0.3),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality-search`."""
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: FASTPROMPT_DATA)")
    parser.add_argument("--steps", type=int, default=1400, help="steps of 8 questions a candidate (default: 1400)")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--limit", type=int, help="at most this many questions of each split: to see that it runs")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")


def run(args: argparse.Namespace) -> int:
    """Trains the groups one after the other; 2 where data or weights are missing."""
    torch.set_num_threads(args.threads)
    folder = args.data or env.data_folder()
    try:
        if folder is None:
            raise MissingData("give the folder of the data sets with --data, or in FASTPROMPT_DATA")
        sizes = settings.SNIPS_PER_INTENT, settings.SNIPS_HELD
        (subject,) = encoder_part.snips(Path(folder) / "snips_cc0_original", *sizes, args.limit)
        encoder = Encoder.find()
    except (MissingData, MissingWeights) as error:
        print(error, file=sys.stderr)
        return 2
    held = min(7 * settings.SNIPS_HELD, args.limit or sys.maxsize)
    ledger = Ledger(args.out)
    ledger.note("machine", benchmark="quality-search", **machine.facts())
    for group in args.group:
        _search(group, subject, encoder, held, args, ledger)
    return 0


def _search(
    group: str,
    subject: encoder_part.Subject,
    encoder: Encoder,
    held: int,
    args: argparse.Namespace,
    ledger: Ledger,
) -> None:
    candidates = {c.name: c for c in GROUPS[group]}

    def listen(progress: Progress) -> None:
        if not progress.evaluated:
            return
        for name, state in progress.states.items():
            score = state.history[-1]["scores"]["f1"]
            ledger.note("candidate", group=group, **asdict(candidates[name]), step=progress.step, validation=score)
            print(f"{group:7} {name:24} step {progress.step:5}  validation F1 {100 * score:.2f}", flush=True)

    model = encoder.prompted(str(subject.task.auto_class), subject.task.num_labels() or 1)
    jobs = [c.job(subject, held, args.steps, args.evaluations) for c in candidates.values()]
    train(model, jobs, listen=listen, eval_batch_size=128, options={"use_cpu": True, "disable_tqdm": True})
