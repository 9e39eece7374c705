"""Outcomes of ops for people (lines while it runs, one table an op at the end) and for the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.attention_cases import BASELINES
from bench.ceilings import Ceilings
from bench.measure import Spread
from bench.op_run import OURS, OpOutcome, Settings, Verdict

_WIDE = 180  # columns where the output is not a terminal
_STYLES = {True: "green", False: "bold red", None: "dim"}
_WORDS = {True: "pass", False: "FAIL", None: ""}


def lines(outcome: OpOutcome, clock: str) -> str:
    """An outcome as it is printed when its case is done."""
    share, time = outcome.share, outcome.time
    worst = max(outcome.errors[OURS].items(), key=lambda item: item[1])
    shown = [
        f"{outcome.case.name}  {outcome.dtype}, {buffers(outcome)}",
        f"  green: {worst[0]} is off by {worst[1]:.2f} of its bound at most",
        f"  {OURS:12} {1e6 * time.median:9.1f} us [{1e6 * time.p20:.1f}, {1e6 * time.p80:.1f}] {clock}, "
        f"{share.gflops:.3g} GFLOP/s, {share.gbs:.1f} GB/s, {share.share:.0%} of the ceiling ({share.bound})",
    ]
    verdicts = {v.over: v for v in outcome.verdicts}
    for ratio in outcome.ratios:
        spread: Spread = getattr(ratio, clock)
        state = "" if ratio.quiet else ", busy"
        shown.append(
            f"  {ratio.over:12} {spread.median:9.2f} x  [{spread.p20:.2f}, {spread.p80:.2f}] n={spread.count}{state}"
            f"  {_goal(verdicts[ratio.over])}  ({outcome.about[ratio.over]})"
        )
    return "\n".join(shown)


def buffers(outcome: OpOutcome) -> str:
    return "hot" if outcome.sets == 1 else f"rotating over {outcome.sets} sets"


def ceilings(limits: Ceilings) -> str:
    """The ceilings in one line, with how they were found."""
    matrix = [f"{dtype} {c.rate / 1e9:.0f} GFLOP/s ({c.how})" for dtype, c in limits.matrix.items()]
    found = ", ".join([f"{limits.memory.rate / 1e9:.1f} GB/s ({limits.memory.how})", *matrix])
    quiet = all(c.quiet for c in (limits.memory, *limits.matrix.values()))
    return f"ceilings: {found}{'' if quiet else '; busy machine: they may be higher'}"


def record(outcome: OpOutcome) -> dict[str, Any]:
    """An outcome as the journal holds it."""
    times = {
        name: {clock: asdict(Spread.of([getattr(s, clock) for s in runs])) for clock in ("wall", "cpu")}
        for name, runs in outcome.samples.items()
    }
    return {
        "op": outcome.case.op,
        "case": outcome.case.name,
        "dtype": outcome.dtype,
        "buffers": buffers(outcome),
        "about": outcome.about,
        "errors": outcome.errors,
        "times": times,
        "ratios": [asdict(ratio) for ratio in outcome.ratios],
        "share": asdict(outcome.share),
        "verdicts": [asdict(verdict) for verdict in outcome.verdicts],
    }


def show(outcomes: Sequence[OpOutcome], settings: Settings) -> None:
    """A table an op, one row an outcome; ratios are baseline / ours, so more is better."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    print(ceilings(settings.ceilings))
    for op in dict.fromkeys(outcome.case.op for outcome in outcomes):
        of_op = [outcome for outcome in outcomes if outcome.case.op == op]
        console.print(_table(op, of_op, settings))
        for name, about in _about(of_op).items():
            print(f"{name}: {about}")


def _table(op: str, outcomes: Sequence[OpOutcome], settings: Settings) -> Table:
    names = list(_about(outcomes))
    title = f"{op}, impl {settings.impl}: baseline / ours, {settings.clock} time"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", overflow="fold", min_width=30)
    for name in ("", "buffers", "us", "GFLOP/s", "GB/s"):
        table.add_column(name, justify="right")
    for name in ("ceiling", *names):
        table.add_column(name)
    for outcome in outcomes:
        verdicts = {v.over: v for v in outcome.verdicts}
        share = outcome.share
        table.add_row(
            outcome.case.name, outcome.dtype, "hot" if outcome.sets == 1 else "rotating",
            f"{1e6 * outcome.time.median:.1f}", f"{share.gflops:.3g}", f"{share.gbs:.1f}",
            _cell(verdicts["ceiling"], f"{share.share:.0%} {share.bound}", ".0%"),
            *(_cell(verdicts[n], f"{verdicts[n].value:.2f}", "g") if n in verdicts else Text("") for n in names),
        )  # fmt: skip
    return table


def _about(outcomes: Sequence[OpOutcome]) -> dict[str, str]:
    """What ours is compared to, the reference last, each with what it is."""
    found: dict[str, str] = {}
    for outcome in outcomes:
        kinds = BASELINES if outcome.case.op == "prefix_attention" else {}
        for name in outcome.about:
            if name != OURS:
                found.setdefault(name, kinds.get(name, outcome.about[name]))
    return {name: found[name] for name in sorted(found, key="reference".__eq__)}


def _cell(verdict: Verdict, value: str, form: str) -> Text:
    goal = "" if verdict.target is None else f" >= {verdict.target:{form}} {_WORDS[verdict.met]}"
    return Text(value + goal, style=_STYLES[verdict.met])


def _goal(verdict: Verdict) -> str:
    return f"target >= {verdict.target:g}: {_WORDS[verdict.met] or 'not judged'}"
