"""Cases of a benchmark that time contestants in one interleaved run: their targets, and how they are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from bench import options, session
from bench.backbones import LlamaSize
from bench.measure import Agreement, CheckFailed, Journal, Ratio, Sample, Spread

VERDICTS = {None: "", True: ": met", False: ": MISSED"}
NOISE = 1.02  # a ratio to this is "the same time" even where the machine's own noise is smaller


@dataclass(frozen=True)
class Target:
    """What a median must be, on a quiet machine; None is open on that side."""

    at_least: float | None = None
    at_most: float | None = None

    def holds(self, median: float) -> bool:
        return (self.at_least is None or median >= self.at_least) and (self.at_most is None or median <= self.at_most)

    def met(self, ratio: Ratio) -> bool:
        """Whether a ratio's median wall time is as it must be."""
        return self.holds(ratio.wall.median)

    def describe(self) -> str:
        return f">= {self.at_least:g}x" if self.at_least is not None else f"<= {self.at_most:.3g}x"


@dataclass(frozen=True)
class Outcome:
    """A case that ran: its samples, what was checked, and its ratios with their targets."""

    case: str
    samples: dict[str, list[Sample]]
    checks: Sequence[Agreement]
    ratios: Sequence[tuple[Ratio, Target | None]]

    def report(self, journal: Journal, judge: bool) -> bool:
        """Writes and prints it where its checks are green; whether a target was missed."""
        for check in self.checks:
            check.finish()
        for check in self.checks:
            journal.write(
                "check", case=self.case, green=True, what=check.what, compared=check.compared, worst=check.worst
            )
            print(f"  green: {check.what}: {check.compared} compared, largest relative difference {check.worst:.1e}")
        journal.samples(self.case, self.samples)
        width = max(map(len, self.samples))
        for name, runs in self.samples.items():
            wall, cpu = (Spread.of([getattr(r, clock) for r in runs]) for clock in ("wall", "cpu"))
            others = Spread.of([r.others for r in runs])
            print(
                f"  {name:{width}} wall {wall.median:8.3f} s [{wall.p20:.3f}, {wall.p80:.3f}]  cpu {cpu.median:8.3f} s "
                f"[{cpu.p20:.3f}, {cpu.p80:.3f}]  n={wall.count}  others {others.median:.2f} cores"
            )
        missed = False
        for ratio, target in self.ratios:
            verdict = target.met(ratio) if target is not None and judge and ratio.quiet else None
            missed = missed or verdict is False
            goal = None if target is None else target.describe()
            journal.write("ratio", case=self.case, target=goal, met=verdict, **asdict(ratio))
            print(f"  {_line(ratio)}{'' if goal is None else f'  target {goal}'}{VERDICTS[verdict]}")
        return missed


def add_arguments(parser: argparse.ArgumentParser, cases: Sequence[str]) -> None:
    """The options of a benchmark that `run_cases` runs."""
    options.choice(parser, "--case", cases, "which cases")
    options.add(parser, "quick", "rounds", "threads", "wait", "out")


def run_cases(
    benchmark: str, backbone: LlamaSize, cases: Mapping[str, Callable[[Journal], bool]], args: argparse.Namespace
) -> int:
    """Runs the cases that were asked for; 1 where a check failed or a case, by what it returns, missed a target."""
    failed = False
    with session.opened(args, benchmark, backbone=asdict(backbone)) as journal:
        print(backbone.describe())
        for case in args.case:
            print(f"\n{case}", flush=True)
            session.wait(args.wait)
            try:
                missed = cases[case](journal)
            except CheckFailed as error:
                session.red(journal, error, case=case)
                missed = True
            failed = failed or missed
    return int(failed)


def _line(ratio: Ratio) -> str:
    wall, cpu = ratio.wall, ratio.cpu
    state = "quiet" if ratio.quiet else "busy machine: no proof"
    return (
        f"{ratio.over} / {ratio.under}: wall {wall.median:.3f}x [{wall.p20:.3f}, {wall.p80:.3f}]  "
        f"cpu {cpu.median:.3f}x [{cpu.p20:.3f}, {cpu.p80:.3f}]  {wall.count} pairs, {state}"
    )
