"""How the settings for SNIPS were looked for: candidates trained in one run, scored on validation only.

    python -m bench quality-search --data FOLDER --out FILE

It may be stopped once the curves say enough; every line is written as it comes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastprompt as fp
from bench import machine, options
from bench.quality import encoder_part, settings
from bench.quality.backbone import Encoder, MissingWeights
from bench.quality.command import add_data
from bench.quality.data import MissingData
from bench.quality.ledger import Ledger
from fastprompt import env
from fastprompt.training.data import load
from fastprompt.training.job import Job
from fastprompt.training.result import Progress
from fastprompt.training.run import train


@dataclass(frozen=True)
class Candidate:
    """What is varied: the prompt's config, and both learning rates."""

    config: fp.PTuningV2
    learning_rate: float
    head_learning_rate: float

    @property
    def name(self) -> str:
        parts = [self.learning_rate, self.head_learning_rate, *self.varied().values()]
        return "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)

    def varied(self) -> dict[str, Any]:
        """Length, init, and what else the config says other than by default; an init's text is left out."""
        config = self.config
        plain = fp.PTuningV2(num_virtual_tokens=config.num_virtual_tokens).to_dict()
        init = {"init_std": config.init_std} if config.init == "random" else {"init": config.init}
        others = {k: v for k, v in config.to_dict().items() if v != plain[k] and not k.startswith("init")}
        return {"virtual_tokens": config.num_virtual_tokens, **init, **others}

    def job(self, subject: encoder_part.Subject, held: int, steps: int, evaluations: int) -> Job:
        return Job(
            name=self.name,
            task=subject.task,
            train=load(subject.train),
            validation=load(subject.other[:held]),
            config=self.config,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            batch_size=8,
            steps=steps,
            evaluate_every=max(1, steps // evaluations),
            schedule="cosine",
        )


def _table(length: int, rate: float, head: float, std: float = 0.02, **options: Any) -> Candidate:
    return Candidate(fp.PTuningV2(num_virtual_tokens=length, init_std=std, **options), rate, head)


def _words(length: int, rate: float, head: float, **options: Any) -> Candidate:
    return _table(length, rate, head, init="activations", init_text=settings.SNIPS_WORDS, **options)


GROUPS = {  # trained together; each came of what the ones before showed
    "rates": (
        _table(32, 1e-2, 1e-2),
        _table(32, 3e-2, 1e-2),
        _table(64, 1e-2, 1e-2),
        _table(16, 1e-2, 1e-2),
        _table(32, 5e-3, 5e-3),
        _table(32, 1e-2, 3e-3),
    ),
    "init": (
        _table(32, 3e-2, 3e-3),
        _table(32, 1e-1, 3e-3),
        _table(64, 3e-2, 3e-3),
        _table(32, 3e-2, 3e-3, 1.0),
        _table(32, 3e-2, 3e-3, 0.3),
        _table(32, 3e-2, 1e-3),
    ),
    "around": (
        _table(32, 3e-2, 3e-3, 0.3),
        _table(64, 3e-2, 3e-3, 0.3),
        _table(32, 3e-2, 1e-2, 0.3),
        _table(32, 3e-2, 1e-2, 0.1),
        _table(32, 6e-2, 1e-2, 0.3),
        _table(32, 1e-2, 5e-3, 0.3),
    ),
    "words": (
        _words(32, 3e-2, 3e-3),
        _words(32, 1e-2, 3e-3),
        _words(32, 3e-2, 3e-3, dropout=0.1),
        _table(32, 3e-2, 3e-3, 0.3, dropout=0.1),
        _table(32, 3e-3, 3e-3, reparameterization="mlp"),
        _words(32, 3e-3, 3e-3, reparameterization="mlp"),
    ),
    "around words": (
        _words(32, 5e-2, 3e-3),
        _words(64, 3e-2, 3e-3),
        _words(32, 3e-2, 1e-2),
        _words(32, 2e-2, 5e-3),
        _words(32, 3e-4, 3e-3, reparameterization="mlp"),
        _words(32, 1e-3, 3e-3, reparameterization="mlp", hidden_size=128),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality-search`."""
    options.choice(parser, "--group", GROUPS, "which groups of candidates")
    add_data(parser)
    parser.add_argument("--steps", type=int, default=1400, metavar="N", help="steps a candidate (default: 1400)")
    parser.add_argument("--evaluations", type=int, default=4, metavar="N", help="of each candidate (default: 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each split at most: to see that it runs")
    options.add(parser, "threads", "out")


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
            chosen = candidates[name]
            rates = {"learning_rate": chosen.learning_rate, "head_learning_rate": chosen.head_learning_rate}
            ledger.note("candidate", group=group, **rates, **chosen.varied(), step=progress.step, validation=score)
            print(f"{group:7} {name:36} step {progress.step:5}  validation F1 {100 * score:.2f}", flush=True)

    model = encoder.prompted(str(subject.task.auto_class), subject.task.num_labels() or 1)
    jobs = [c.job(subject, held, args.steps, args.evaluations) for c in candidates.values()]
    train(model, jobs, listen=listen, eval_batch_size=128, options={"use_cpu": True, "disable_tqdm": True})
