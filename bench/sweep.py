"""How cost grows with prompt length, prompts, rows and context, and where reading a prompt for many rows loses.

Every point is one interleaved run of ours and its baselines, checked as in `micro`. Fits are of the medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from bench import attention_baselines as baselines
from bench import attention_run, bank_law, laws, micro, options
from bench import op_report as report
from bench.attention_cases import Case
from bench.attention_inputs import DTYPES, build
from bench.laws import LAWS, REGION, Fit, Law
from bench.measure import Journal
from bench.memory import allocated
from bench.op_run import OURS, OpOutcome, Settings, spread

_REGION = "region"
_BANK = "prompts in the bank"
NAMES = (*(law.name for law in LAWS), _BANK, _REGION)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench sweep`."""
    options.choice(parser, "--law", NAMES, "which laws")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the tensors (default: fp32)")
    options.add(parser, "impl", "quick", "threads", "wait", "out", rounds=7)


def run(args: argparse.Namespace) -> int:
    """Measures the points and prints the exponents; 1 where a check was red."""
    with micro.opened(args, "sweep", [args.dtype]) as (settings, journal):
        whole = all([_law(law, args, settings, journal) for law in LAWS if law.name in args.law])
        if _BANK in args.law:
            _bank(settings, journal)
        if _REGION in args.law:
            whole = _region(args, settings, journal) and whole
    return int(not whole)


def _law(law: Law, args: argparse.Namespace, settings: Settings, journal: Journal) -> bool:
    """Measures the points of a law and fits them; whether all were green."""
    print(f"\n{law.name}: {law.about}", flush=True)
    settings = replace(settings, baselines=("expanded", "folded"))
    seconds: dict[str, dict[float, float]] = {}
    held: dict[str, dict[float, float]] = {}
    points = {x: case.shrunk() if settings.quick else case for x, case in law.points.items()}
    for x, case in points.items():
        outcome = micro.measured(attention_run.run, case, args.dtype, settings, args.wait, journal)
        if outcome is None:
            return False
        taken = {name: spread(samples, settings.clock).median for name, samples in outcome.samples.items()}
        memory = _allocated(case, args.dtype, outcome, settings)
        journal.write("point", law=law.name, x=x, allocated=memory, **report.record(outcome))
        for kept, found in ((seconds, taken), (held, memory)):
            for name, value in found.items():
                kept.setdefault(name, {})[x] = value
        shown = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in taken.items())
        print(f"  {x:6}  {shown}; allocated {_bytes(memory)}", flush=True)
    for quantity, kept in (("seconds", seconds), ("bytes", held)):
        for name, values in kept.items():
            _fits(law.name, name, quantity, values, journal)
    return True


def _bank(settings: Settings, journal: Journal) -> None:
    print(f"\n{_BANK}: {bank_law.ABOUT}", flush=True)
    points = bank_law.measure_all(settings)
    for x, point in points.items():
        journal.write("point", law=_BANK, x=x, **point)
        wall = point["times"][OURS][settings.clock]["median"]
        print(f"  {x:6}  {1e6 * wall:.1f} us; the bank holds {_bytes({'prompts': point['allocated']['bank']})}")
    _fits(_BANK, OURS, "seconds", {x: p["times"][OURS][settings.clock]["median"] for x, p in points.items()}, journal)
    _fits(_BANK, "bank", "bytes", {x: p["allocated"]["bank"] for x, p in points.items()}, journal)


def _region(args: argparse.Namespace, settings: Settings, journal: Journal) -> bool:
    """Ours, which reads a prompt for several rows where that pays, against every row alone and against folded SDPA."""
    print("\nregion: decoding 32 rows, by virtual tokens and rows a prompt; baseline / ours", flush=True)
    settings = replace(settings, baselines=("folded", "single pass"))
    for (virtual, rows), case in REGION.items():
        case = case.shrunk() if settings.quick else case
        outcome = micro.measured(attention_run.run, case, args.dtype, settings, args.wait, journal)
        if outcome is None:
            return False
        journal.write("point", law=_REGION, x=virtual, y=rows, **report.record(outcome))
        shown = ", ".join(f"{r.over} {getattr(r, settings.clock).median:.2f}" for r in outcome.ratios)
        print(f"  P{virtual:<5} {rows:2} rows a prompt: {shown}", flush=True)
    return True


def _allocated(case: Case, dtype: str, outcome: OpOutcome, settings: Settings) -> dict[str, int]:
    """Bytes that torch allocates in one call, its result among them."""
    inputs = build(case, dtype)
    forms = {form.about: form for form in baselines.forms(case, inputs.mask, inputs.q.dtype)}
    entries = {OURS: baselines.ours(case, settings.impl)}
    entries["expanded"] = baselines.expanded(case, forms[outcome.about["expanded"]])
    return {name: allocated(entry.build(inputs)) for name, entry in entries.items()}


def _fits(law: str, name: str, quantity: str, values: dict[float, float], journal: Journal) -> None:
    """The exponents over all points and over the large end, written and told."""
    x: Sequence[float] = list(values)
    for part, start in (("all", 0), ("large", laws.large_end(x))):
        found = laws.fit(x[start:], list(values.values())[start:])
        if found is not None:
            journal.write("fit", law=law, name=name, quantity=quantity, part=part, **asdict(found))
            print(f"  {name}, {quantity}: {_exponent(found)}", flush=True)


def _exponent(found: Fit) -> str:
    return f"x^{laws.exponent(found.exponent)} +- {found.error:.2f} from {found.first:g} to {found.last:g}"


def _bytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**10:.0f} KiB" for name, size in sizes.items())
