"""Two runs of a benchmark, number by number, as ratios new / old; what became slower is flagged.

A time of ours is slower if it grew by more than the tolerance, its spread lies above the old one, and what other
contestants of the same case took in the same runs does not explain it: the ratio of growths is beyond the tolerance
too. A machine that is slower today makes nobody's regression.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import runs
from bench.runs import Line, Run

TOLERANCE = 0.1  # share by which a time may grow
_PEERS = re.compile(
    r"bare\b.*|peft\b.*|.*, PEFT|generate, no prompts|no prompts|concatenated|explicit|expanded|folded|reference|"
    r"scattered|by row|formula|interpolated|gathered|ready|by head|all heads|single pass|all layers|"
    r"sdpa .*|concatenation .*|flex|varlen|flash.*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Value:
    """A number of a run, with its 20th and 80th percentile; `more` where more of it is better."""

    median: float
    p20: float
    p80: float
    more: bool = False


@dataclass(frozen=True)
class Change:
    """One number in both runs: how much worse it became, and that beside the peers of its case."""

    case: str
    name: str
    old: Value
    new: Value
    ratio: float
    relative: float
    ours: bool

    def verdict(self, tolerance: float) -> str:
        if not self.ours:
            return ""
        low, high = (self.old.p20, self.old.p80) if not self.old.more else (self.old.p80, self.old.p20)
        apart_worse = self.new.p20 > high if not self.new.more else self.new.p80 < high
        apart_better = self.new.p80 < low if not self.new.more else self.new.p20 > low
        if min(self.ratio, self.relative) > 1 + tolerance and apart_worse:
            return "SLOWER"
        return "quicker" if max(self.ratio, self.relative) < 1 / (1 + tolerance) and apart_better else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench compare`."""
    parser.add_argument("old", type=Path, help="a file of results, of which the last run of each benchmark counts")
    parser.add_argument("new", type=Path, help="another one, or the same for its last two runs")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"share by which a time may grow (default: {TOLERANCE})"
    )


def run(args: argparse.Namespace) -> int:
    """Prints every number that is in both; 1 where one of ours became slower, 2 where there is nothing to compare."""
    pairs = list(_pairs(runs.read(args.old), runs.read(args.new), args.old == args.new))
    if not pairs:
        print("the two files have no run of the same benchmark at the same size")
        return 2
    slower = 0
    for old, new in pairs:
        print(f"old: {old.describe()}\nnew: {new.describe()}")
        if old.kind != new.kind:
            print("  machines of different kinds: ratios say what differs, not what regressed")
        found = changes(old, new)
        for change in found:
            print(line(change, args.tolerance))
        slower += sum(change.verdict(args.tolerance) == "SLOWER" for change in found)
    print(f"{slower} slower by more than {args.tolerance:.0%}")
    return int(slower > 0)


def since_last(new: Run, tolerance: float = TOLERANCE) -> list[str]:
    """What changed since the last committed run on a machine of the same kind, in lines; none where there is none."""
    known = [r for r in runs.in_folder() if r.machine["time"] < new.machine["time"]]
    old = None if new.quick else runs.latest(known, new.benchmark, new.kind)
    if old is None:
        return []
    found = changes(old, new)
    moved = [line(change, tolerance) for change in found if change.verdict(tolerance)]
    head = f"since {old.describe()}: {len(found)} numbers compared"
    return [f"{head}, none of ours moved by more than {tolerance:.0%}"] if not moved else [head, *moved]


def changes(old: Run, new: Run) -> list[Change]:
    """Every number that both runs have, in the order of the new one."""
    before, after = dict(values(old)), dict(values(new))
    both = [key for key in after if key in before]
    growth = {key: _growth(before[key], after[key]) for key in both}
    found = []
    for case, name in both:
        peers = [growth[key] for key in both if key[0] == case and _is_peer(key[1])]
        relative = growth[case, name] / (statistics.median(peers) if peers else 1.0)
        ours = not _is_peer(name)
        pair = before[case, name], after[case, name]
        found.append(Change(case, name, *pair, growth[case, name], relative, ours))
    return found


def values(run: Run) -> Iterator[tuple[tuple[str, str], Value]]:
    """The numbers of a run, by case and name."""
    for entry in run.lines:
        kind = entry["kind"]
        if kind == "time" and "part" in entry:
            case = f"{entry['unit']}, {entry['launch']}, {entry['buffers']}"
            yield (case, entry["name"]), _value(entry["seconds"])
        elif kind == "time":
            yield (entry["case"], entry["name"]), _value(entry[run.clock])
        elif kind in ("case", "point"):
            law = f"{entry['law']} {entry['x']:g}, " if kind == "point" else ""
            for name, clocks in entry["times"].items():
                yield (f"{law}{entry['case']} {entry['dtype']}", name), _value(clocks[run.clock])
        elif kind == "seconds":
            yield (f"{entry['names']} names", entry["what"]), _value(entry)
        elif kind == "load":
            yield ("tokens a second", entry["kind_of_request"]), _value(entry["tokens_per_second"], more=True)


def line(change: Change, tolerance: float) -> str:
    verdict = change.verdict(tolerance)
    return (
        f"  {change.case} | {change.name}: {change.ratio:.3f}x, {change.relative:.3f}x beside its peers"
        f"{'  ' + verdict if verdict else ''}"
    )


def _pairs(old: list[Run], new: list[Run], same: bool) -> Iterator[tuple[Run, Run]]:
    """The last run of each benchmark and size in the new file, with its counterpart in the old one."""
    last = {(r.benchmark, r.quick): r for r in new}
    for key, after in last.items():
        before = [r for r in old if (r.benchmark, r.quick) == key and not (same and r.machine == after.machine)]
        if before:
            yield before[-1], after


def _growth(old: Value, new: Value) -> float:
    """By what factor a number became worse."""
    return old.median / new.median if new.more else new.median / old.median


def _value(spread: Line | dict[str, Any], more: bool = False) -> Value:
    return Value(spread["median"], spread["p20"], spread["p80"], more)


def _is_peer(name: str) -> bool:
    return _PEERS.fullmatch(name) is not None
