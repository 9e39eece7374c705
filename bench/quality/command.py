"""Quality of trained prompts on real data and real weights: how close they come to other ways of learning.

    clinc150   ten domains of fifteen intents: ten P-Tuning v2 prompts trained in one run, against fine-tuning the whole
               encoder on each domain, and linear probes on [CLS] and on the mean; accuracy
    snips      slots: P-Tuning v2 against the same; entity F1
    facts      probing the embedded causal backbone: P-Tuning templates, trained ones against hand-written ones; P@1

Validation chooses which evaluation, penalty or template counts; test examples are scored. A run may be killed at any
time: with --out, results that the file has are not computed again; with --work, prompts in training go on from their
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import machine, options
from bench.quality import encoder_part, report, settings
from bench.quality.backbone import Encoder, MissingWeights
from bench.quality.data import MissingData
from bench.quality.encoder_part import Part
from bench.quality.facts_part import FactsPart
from bench.quality.ledger import Ledger, Unit
from bench.quality.probe import EACH, FIRST, MEAN
from fastprompt import env

PARTS = ("clinc150", "snips", "facts")
_QUICK_ROWS, _QUICK_STEPS = 12, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quality`."""
    options.choice(parser, "--part", PARTS, "which parts")
    parser.add_argument(
        "--way", nargs="*", metavar="NAME", help="only these, such as p_tuning_v2, full, probe; none: what is known"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds of all that is trained: 0, 1, ... (default: 3)"
    )
    add_data(parser)
    parser.add_argument(
        "--backbone", type=Path, metavar="FOLDER", help="an encoder (default: MiniLM of a Python package)"
    )
    parser.add_argument(
        "--head", choices=("mean", "cls"), default="mean", help="what CLINC150's heads read (default: mean)"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where checkpoints of prompts in training are kept")
    options.add(parser, "quick", "threads", "out")


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option that says where the data sets are."""
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data sets' folder (default: FASTPROMPT_DATA)")


def run(args: argparse.Namespace) -> int:
    """Computes what is missing and prints all; 1 where a target was missed, 2 where data or weights are missing."""
    torch.set_num_threads(args.threads)
    try:
        parts = {name: _part(name, args) for name in args.part}
    except (MissingData, MissingWeights) as error:
        print(error, file=sys.stderr)
        return 2
    ledger = Ledger(args.out)
    ledger.note("machine", benchmark="quality", quick=args.quick, arguments=args.part, **machine.facts())
    units = {name: part.units(range(args.seeds)) for name, part in parts.items()}
    for name, all_of_it in units.items():
        print(f"\n{name}", flush=True)
        for unit in (u for u in all_of_it if args.way is None or set(u.ways) & set(args.way)):
            began = time.perf_counter()
            print(f"  {', '.join(unit.ways)}, seed {unit.seed}, {_tasks(unit)}", flush=True)
            found = ledger.complete(unit)
            mean = sum(r.score.test for r in found) / len(found)
            print(f"    test {mean:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return _tell(ledger, units, judge=not args.quick)


def _tell(ledger: Ledger, units: dict[str, list[Unit]], judge: bool) -> int:
    """Prints a table of all that is known of each part, and the verdicts; 1 where a target was missed."""
    results = [r for part in units.values() for unit in part for r in ledger.of(unit)]
    wanted = {name: len({task for unit in part for _, task in unit.gives}) for name, part in units.items()}
    found = report.lines(results, wanted)
    missed = False
    for name in units:
        print(f"\n{name}: test score in points")
        for line in (line for line in found if line.part == name):
            print(f"  {line.describe()}")
        for verdict in (v for v in report.verdicts(found) if v.target.part == name):
            missed = missed or (judge and verdict.met is False)
            print(f"  {verdict.describe()}")
    return int(missed)


def _tasks(unit: Unit) -> str:
    tasks = list(dict.fromkeys(task for _, task in unit.gives))
    return tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"


def _part(name: str, args: argparse.Namespace) -> Part | FactsPart:
    def short(recipe: Any) -> Any:
        return replace(recipe, steps=_QUICK_STEPS) if args.quick else recipe

    work = args.work / "quick" if args.work and args.quick else args.work

    def tell(text: str) -> None:
        print(text, flush=True)

    if name == "facts":
        return FactsPart(settings.FACTS_TEMPLATE, short(settings.FACTS), work, tell)
    given = args.data or env.data_folder()
    if given is None:
        raise MissingData(f"{name} needs data sets: give their folder with --data, or in FASTPROMPT_DATA")
    folder, limit = Path(given), _QUICK_ROWS if args.quick else None
    poolings: tuple[str, ...]
    encoder = Encoder.find(args.backbone, pool_mean=name == "clinc150" and args.head == "mean")
    if name == "clinc150":
        subjects = encoder_part.clinc150(folder / "clinc150", limit)
        recipes, poolings = (settings.CLINC150, settings.CLINC150_FULL), (FIRST, MEAN)
    else:
        sizes = settings.SNIPS_PER_INTENT, settings.SNIPS_HELD
        subjects = encoder_part.snips(folder / "snips_cc0_original", *sizes, limit)
        recipes, poolings = (settings.SNIPS, settings.SNIPS_FULL), (EACH,)
    recipe, full = map(short, recipes)
    return Part(name, subjects, recipe, full, encoder, poolings, work, tell)
