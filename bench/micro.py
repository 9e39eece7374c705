"""Every op against its peers, shape by shape, on the CPU.

Every case is one interleaved run of all contestants. Before it, and again on what the timed calls returned, ours must
be within the bound of the ops against float64 and the others must agree; else the case is red and shows no ratio.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import (
    attention_run,
    ceilings,
    embed_prompts,
    grouped_linear,
    merge_states,
    op_cases,
    options,
    paged_prefix_attention,
    session,
)
from bench import op_report as report
from bench.attention_cases import SETS
from bench.attention_inputs import DTYPES
from bench.measure import CheckFailed, Journal
from bench.op_run import OpOutcome, Settings
from fastprompt import dispatch, native


@dataclass(frozen=True)
class Op:
    """The shapes of an op by the names of their sets, and what measures one in a dtype."""

    sets: dict[str, Sequence[Any]]
    run: Callable[[Any, str, Settings], OpOutcome]


OPS = {
    "prefix_attention": Op({name: cases for name, cases in SETS.items()}, attention_run.run),
    "paged_prefix_attention": Op({"table": paged_prefix_attention.CASES}, attention_run.run),
    "embed_prompts": Op({"table": embed_prompts.CASES}, op_cases.run),
    "merge_states": Op({"table": merge_states.CASES}, op_cases.run),
    "grouped_linear": Op({"table": grouped_linear.CASES}, op_cases.run),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench micro`."""
    options.choice(parser, "--op", OPS, "which ops")
    add_choices(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The options of any benchmark of ops."""
    parser.add_argument(
        "--set",
        choices=SETS,
        default="table",
        help="cases with targets of their own, or around them (attention only; default: table)",
    )
    parser.add_argument(
        "--cases",
        type=re.compile,
        default=re.compile(""),
        metavar="REGEX",
        help="only cases whose names it is found in",
    )
    options.choice(parser, "--dtypes", DTYPES, "which dtypes, of those that a case has")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--buffers", choices=("hot", "rotating"), help="whether inputs are in the caches (default: per case)"
    )
    options.add(parser, "impl", "quick", "threads", "wait", "out", rounds=15)


def run(args: argparse.Namespace, benchmark: str = "micro") -> int:
    """Measures the cases and prints a table an op; 1 where a check was red or a target was missed."""
    todo = list(_chosen(args))
    if not todo:
        print("no case has such a name and dtype; --list names them", file=sys.stderr)
        return 1
    if args.list:
        for case, dtype in todo:
            print(f"{case.name}  {dtype}")
        return 0
    outcomes, red = [], 0
    with opened(args, benchmark, sorted({dtype for _, dtype in todo}), args.buffers) as (settings, journal):
        for case, dtype in todo:
            outcome = measured(OPS[case.op].run, case, dtype, settings, args.wait, journal)
            if outcome is None:
                red += 1
                continue
            journal.write("case", **report.record(outcome))
            print(report.lines(outcome, settings.clock), flush=True)
            outcomes.append(outcome)
    report.show(outcomes, settings)
    met = [verdict.met for outcome in outcomes for verdict in outcome.verdicts if verdict.target is not None]
    print(f"{red} red, {met.count(True)} targets met, {met.count(False)} missed, {met.count(None)} not judged")
    return int(red > 0 or False in met)


@contextmanager
def opened(
    args: argparse.Namespace, benchmark: str, dtypes: Sequence[str], buffers: str | None = None
) -> Iterator[tuple[Settings, Journal]]:
    """How to measure, with the ceilings of this machine, and the run's journal; no gradients meanwhile."""
    impl = dispatch.choose("prefix_attention", args.impl, torch.device("cpu"), *(DTYPES[dtype] for dtype in dtypes))
    isa = native.load().isa() if impl == "cpu" else None
    with session.opened(args, benchmark, impl=impl, isa=isa) as journal, torch.no_grad():
        clock = "cpu" if args.threads == 1 else "wall"
        session.wait(args.wait)
        limits = ceilings.of_machine(list(dtypes), clock, args.quick)
        journal.write("ceilings", **asdict(limits))
        print(f"impl {impl} {isa or ''}; {clock} time counts; {report.ceilings(limits)}\n", flush=True)
        rotate = None if buffers is None else buffers == "rotating"
        rounds = min(args.rounds, 2) if args.quick else args.rounds
        yield Settings(impl, clock, limits, rounds, rotate, args.quick), journal


def measured(
    run: Callable[[Any, str, Settings], OpOutcome],
    case: Any,
    dtype: str,
    settings: Settings,
    wait: float,
    journal: Journal,
) -> OpOutcome | None:
    """Measures one case; None where a check was red, which is told and kept in the journal."""
    session.wait(wait)
    try:
        return run(case, dtype, settings)
    except CheckFailed as error:
        session.red(journal, error, case=case.name, dtype=dtype)
        return None


def _chosen(args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    for case in (case for op in args.op for case in OPS[op].sets.get(args.set, ())):
        if args.cases.search(case.name):
            yield from ((case.shrunk() if args.quick else case, d) for d in case.dtypes if d in args.dtypes)
