"""What a training step costs on the CPU, against PEFT and against the bare backbone with gradients to its embeddings.

step          one prompt for all rows, each method: forward, backward and optimiser, in one interleaved run
memory        by how much a fresh process grows at the peak of such a step
together-N    16 prompts of two rows of N tokens trained in one batch, against PEFT one prompt after the other, and
              the bare backbone's rows in one batch against two at a time
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import measure, outcome
from bench.backbones import LlamaSize, llama
from bench.measure import Journal, Spread
from bench.memory import peak_growth
from bench.outcome import VERDICTS, Outcome, Target
from bench.train_steps import CONFIGS, Checks, Step, Work, bare, fastprompt_model, ours, peft_models, theirs

STEP = {"prompt tuning": 1.08, "p-tuning": 1.08, "prefix tuning": 1.01}  # of the bare backbone's step, at most
MEMORY = 1.10  # of the bare backbone's growth, at most
TOGETHER = {16: 1.9, 32: 1.5, 128: 1.1}  # tokens a row -> PEFT's time in units of ours, at least
_MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """How large the cases are, and how often they run."""

    backbone: LlamaSize
    rounds: int
    one: tuple[int, int, int]  # rows, tokens, virtual tokens
    many: tuple[int, int, int]  # prompts, rows of each, virtual tokens
    processes: int  # fresh processes a contestant's memory is measured in

    def one_prompt(self, method: str) -> Work:
        rows, tokens, length = self.one
        return Work(self.backbone, method, 1, rows, tokens, length)


FULL = Size(LlamaSize(12, 512, 8, 2, 1408), 7, (32, 128, 64), (16, 2, 64), 3)
QUICK = Size(LlamaSize(2, 64, 4, 2, 128, 100), 2, (3, 9, 5), (3, 2, 4), 1)


def step_case(size: Size, rounds: int, judge: bool, journal: Journal) -> bool:
    """One prompt for all rows, every method, in one interleaved run."""
    model = llama(size.backbone)
    alone = Checks("the bare backbone's steps")
    contestants = alone.contestants({"bare": bare(model, [size.one_prompt("prefix tuning").text()])})
    checks = list(alone.all())
    ratios: list[tuple[str, Target | None]] = []
    for method, most in STEP.items():
        work = size.one_prompt(method)
        prompted = fastprompt_model(model, work)
        same = Checks(f"{method}, fastprompt and PEFT")
        steps = {method: ours(prompted, work), f"{method}, PEFT": theirs(peft_models(model, work, prompted), work)}
        contestants |= same.contestants(steps)
        checks += same.all()
        ratios += [(method, Target(at_most=most)), (f"{method}, PEFT", None)]
    samples = measure.interleave(contestants, rounds)
    judged = [(measure.ratio(samples, name, "bare"), target) for name, target in ratios]
    return Outcome("step", samples, checks, judged).report(journal, judge)


def together_case(tokens: int, size: Size, rounds: int, judge: bool, journal: Journal) -> bool:
    """Rows of many prompts in one batch against one prompt after the other; the same of the bare backbone."""
    model = llama(size.backbone)
    prompts, rows, length = size.many
    work = Work(size.backbone, "", prompts, rows, tokens, length)
    alone = Checks("the bare backbone, all rows and in parts")
    contestants = alone.contestants({"bare": bare(model, [work.text()]), "bare, in parts": bare(model, work.batches())})
    checks = list(alone.all())
    ratios: list[tuple[str, str, Target | None]] = [("bare, in parts", "bare", None)]
    for method in ("prefix tuning", "prompt tuning"):
        task = replace(work, method=method)
        prompted = fastprompt_model(model, task)
        same = Checks(f"{method}, fastprompt and PEFT")
        steps = {method: ours(prompted, task), f"{method}, PEFT": theirs(peft_models(model, task, prompted), task)}
        contestants |= same.contestants(steps)
        checks += same.all()
        ratios.append((f"{method}, PEFT", method, Target(at_least=TOGETHER[tokens])))
    samples = measure.interleave(contestants, rounds)
    judged = [(measure.ratio(samples, over, under), target) for over, under, target in ratios]
    return Outcome(f"together-{tokens}", samples, checks, judged).report(journal, judge)


def memory_case(size: Size, judge: bool, journal: Journal) -> bool:
    """The growth of a fresh process at the peak of one step, each contestant in processes of its own."""
    grown: dict[str, Spread] = {}
    for name in ["bare", *(n for method in STEP for n in (method, f"{method}, PEFT"))]:
        bytes_ = [_in_fresh_process(name, size) for _ in range(size.processes)]
        grown[name] = Spread.of(bytes_)
        journal.write("memory", case="memory", name=name, bytes=bytes_)
        print(f"  {name:19} {' '.join(f'{b / _MIB:.0f}' for b in bytes_)} MiB above rest", flush=True)
    missed = False
    for name in (n for n in grown if n != "bare"):
        share = grown[name].median / grown["bare"].median
        target = Target(at_most=MEMORY) if name in STEP else None
        verdict = target.holds(share) if target is not None and judge else None
        goal = None if target is None else target.describe()
        journal.write("memory ratio", case="memory", over=name, under="bare", ratio=share, target=goal, met=verdict)
        print(f"  {name} / bare: {share:.3f}x{'' if goal is None else f'  target {goal}'}{VERDICTS[verdict]}")
        missed = missed or verdict is False
    return missed


def growth_of_step(name: str, size: Size, threads: int) -> int:
    """By how many bytes this process grows at the peak of a contestant's step, after one on a few short rows."""
    torch.set_num_threads(threads)
    model = llama(size.backbone)
    method = name.removesuffix(", PEFT") if name != "bare" else next(iter(CONFIGS))
    work = size.one_prompt(method)

    def step_of(work: Work) -> Step:
        if name == "bare":
            return bare(model, [work.text()])
        prompted = fastprompt_model(model, work)
        return ours(prompted, work) if name == method else theirs(peft_models(model, work, prompted), work)

    step_of(replace(work, rows=2, tokens=5, length=3))()  # loads what is loaded once
    return peak_growth(step_of(work))


def _in_fresh_process(name: str, size: Size) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(growth_of_step, (name, size, torch.get_num_threads()))


CASES: dict[str, Callable[[Size, int, bool, Journal], bool]] = {
    "step": step_case,
    "memory": lambda size, _, judge, journal: memory_case(size, judge, journal),
    **{f"together-{tokens}": partial(together_case, tokens) for tokens in TOGETHER},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench train-cost`."""
    outcome.add_arguments(parser, list(CASES))


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints a table; 1 where a check failed or a target (full size, quiet machine) was missed."""
    size = QUICK if args.quick else FULL
    rounds = args.rounds or size.rounds

    def runner(case: Callable[[Size, int, bool, Journal], bool]) -> Callable[[Journal], bool]:
        return lambda journal: case(size, rounds, not args.quick, journal)

    return outcome.run_cases("train-cost", size.backbone, {name: runner(case) for name, case in CASES.items()}, args)
