"""The whole model in one run of two minutes: forward, generation and training; bare backbone, PEFT, fastprompt.

The cases of `main-job` and `train-cost` at a size at which all of them together take two minutes on two cores. Their
targets are stated for their own sizes, so nothing is judged here; `compare` says what changed since the last run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import main_job, outcome, train_cost
from bench.backbones import LlamaSize
from bench.measure import Journal
from bench.outcome import Outcome


@dataclass(frozen=True)
class Size:
    """How large the cases are: those without gradients, and the training steps."""

    without: main_job.Size
    steps: train_cost.Size


_BACKBONE = LlamaSize(8, 512, 8, 2, 1408)
FULL = Size(
    main_job.Size(_BACKBONE, 7, 3, (16, 64, 16, 16), (8, 64, 128), main_job.FULL.bank),
    train_cost.Size(_BACKBONE, 5, (16, 64, 64), train_cost.FULL.many, 1),
)
QUICK = Size(main_job.QUICK, train_cost.QUICK)

_WITHOUT: dict[str, Callable[[main_job.Size, int], Outcome]] = {
    "forward": main_job.forward_case,
    "prefix": main_job.prefix_case,
    "generate": main_job.generate_case,
}
CASES = (*_WITHOUT, "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench e2e`."""
    outcome.add_arguments(parser, CASES)


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints a table; 1 where a check failed."""
    size = QUICK if args.quick else FULL

    def without(case: Callable[[main_job.Size, int], Outcome]) -> Callable[[Journal], bool]:
        def measure(journal: Journal) -> bool:
            with torch.no_grad():
                return case(size.without, args.rounds or size.without.rounds).report(journal, judge=False)

        return measure

    def step(journal: Journal) -> bool:
        return train_cost.step_case(size.steps, args.rounds or size.steps.rounds, judge=False, journal=journal)

    cases = {name: without(case) for name, case in _WITHOUT.items()} | {"step": step}
    return outcome.run_cases("e2e", size.without.backbone, cases, args)
