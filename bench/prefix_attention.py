"""Prefix attention on the CPU: ours against every correct way to write it with torch's attention, case by case.

Every case is one interleaved run of all contestants. Before it, and again on what the timed calls returned, ours must
be within the bound of the ops against float64 and the others must agree; else the case is red and shows no ratio.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from bench import attention_report as report
from bench import attention_run, ceilings, machine, measure
from bench.attention_cases import SETS, Case
from bench.attention_inputs import DTYPES
from bench.attention_run import Outcome, Settings
from bench.measure import CheckFailed, Journal
from fastprompt import dispatch, native


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench prefix-attention`."""
    parser.add_argument("--set", choices=SETS, default="table", help="cases with targets of their own, or around them")
    parser.add_argument("--cases", type=re.compile, default=re.compile(""), metavar="REGEX", help="of cases' names")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of those a case has")
    parser.add_argument("--impl", choices=dispatch.IMPLS, help="implementation to measure (default: the best here)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each interleaved run (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2); 1 counts CPU time")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine before each case")
    parser.add_argument(
        "--buffers",
        choices=("hot", "rotating"),
        help="whether inputs are in the caches (default: per case)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, judges nothing")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")


def run(args: argparse.Namespace) -> int:
    """Measures the cases and prints a table; 1 where a check was red or a target was missed."""
    todo = list(_chosen(args))
    if not todo:
        print("no case has such a name and dtype; --list names them", file=sys.stderr)
        return 1
    if args.list:
        for case, dtype in todo:
            print(f"{case.name}  {dtype}")
        return 0
    torch.set_num_threads(args.threads)
    with args.out.open("a") if args.out else nullcontext() as out, torch.no_grad():
        journal = Journal(out)
        settings = _settings(args, sorted({dtype for _, dtype in todo}), journal)
        outcomes, red = [], 0
        for case, dtype in todo:
            outcome = _one(case, dtype, settings, args.wait, journal)
            red += outcome is None
            outcomes += [outcome] if outcome else []
        journal.write("end", load=machine.load())
    report.show(outcomes, settings)
    met = [verdict.met for outcome in outcomes for verdict in outcome.verdicts if verdict.target is not None]
    print(f"{red} red, {met.count(True)} targets met, {met.count(False)} missed, {met.count(None)} not judged")
    return int(red > 0 or False in met)


def _chosen(args: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    for case in SETS[args.set]:
        if args.cases.search(case.name):
            yield from ((case.shrunk() if args.quick else case, d) for d in case.dtypes if d in args.dtypes)


def _settings(args: argparse.Namespace, dtypes: list[str], journal: Journal) -> Settings:
    """How to measure, with the ceilings of this machine; says both."""
    impl = dispatch.choose("prefix_attention", args.impl, torch.device("cpu"), *(DTYPES[dtype] for dtype in dtypes))
    here = machine.facts()
    clock = "cpu" if args.threads == 1 else "wall"
    _wait(args.wait)
    limits = ceilings.of_machine(dtypes, clock, args.quick)
    isa = native.load().isa() if impl == "cpu" else None
    journal.write("machine", benchmark="prefix-attention", quick=args.quick, impl=impl, isa=isa, **here)
    journal.write("ceilings", **asdict(limits))
    print(f"{here['cpu']}, {here['cores']} cores, {args.threads} threads, load {here['load']}, impl {impl} {isa or ''}")
    print(f"{clock} time counts; {report.ceilings(limits)}\n", flush=True)
    rotate = None if args.buffers is None else args.buffers == "rotating"
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    return Settings(impl, clock, limits, rounds, rotate, args.quick)


def _one(case: Case, dtype: str, settings: Settings, wait: float, journal: Journal) -> Outcome | None:
    """Measures one case, tells, and keeps it in the journal; None where a check was red."""
    _wait(wait)
    try:
        outcome = attention_run.run(case, dtype, settings)
    except CheckFailed as error:
        journal.write("check", case=case.name, dtype=dtype, green=False, error=str(error))
        print(f"{case.name}  {dtype}: CHECK FAILED, no ratios: {error}", file=sys.stderr)
        return None
    journal.write("case", **report.record(outcome))
    print(report.lines(outcome, settings.clock), flush=True)
    return outcome


def _wait(seconds: float) -> None:
    if seconds and not measure.wait_until_quiet(seconds):
        print("other processes keep the machine busy: times will be noisy")
