"""`python -m bench gpu-check`: every part in processes of its own, one file, one table, one exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import checkout, machine
from bench.gpu_check import plots, records, report, runner
from bench.gpu_check.budget import Budget
from bench.gpu_check.parts import BY_NAME, PARTS, Part
from bench.gpu_check.setting import Setting
from bench.measure import SCHEMA

NO_GPU = 2  # exit status
_QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
_PACKAGES = ("triton", "accelerate", "flash-attn", "flashinfer-python", "matplotlib", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench gpu-check`."""
    parser.add_argument("--part", nargs="+", choices=BY_NAME, default=list(BY_NAME), help="which parts (default: all)")
    parser.add_argument("--minutes", type=_minutes, default=8.5, help="time for all of it (default: 8.5)")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file, and draw beside it")
    parser.add_argument("--impl", help="implementation to check (default: what the ops choose, and all others here)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, judges nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="quick, without a GPU: plain PyTorch on the CPU, or what --impl names"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the parts; 1 where anything failed or a target was missed, 2 without a GPU."""
    if not args.dry_run and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU answers"
        print(f"gpu-check needs an NVIDIA GPU: {why} (torch {torch.__version__}).", file=sys.stderr)
        print("--dry-run goes through everything that needs none, on the CPU, and proves nothing.", file=sys.stderr)
        return NO_GPU
    checkout.find_kernels()
    with args.out.open("a") if args.out else nullcontext() as out:
        lines = Run(args, out).all()
    print(f"\n{report.table(lines)}")
    if args.out:
        _leave_beside(args.out, lines)
    return int(report.failed(lines))


def _leave_beside(out: Path, lines: list[dict[str, Any]]) -> None:
    """The cost tables of a run with the last one that it measured, and pictures; these may fail."""
    tables = [line["table"] for line in lines if line["kind"] == "table"][-1:]
    if tables:
        path = out.with_suffix(".costs.json")
        usual = json.loads((checkout.ROOT / "fastprompt" / "costs.json").read_text())
        path.write_text(json.dumps({"tables": tables + usual["tables"]}, indent=2) + "\n")
        print(f"cost tables, for FASTPROMPT_COSTS: {path}")
    try:
        for path in plots.draw(lines, out.with_suffix("")):
            print(f"drawn: {path}")
    except Exception as error:
        print(f"no pictures: {error!r}")


class Run:
    """One run: its setting, what came of it so far, and where that is written."""

    def __init__(self, args: argparse.Namespace, out: TextIO | None) -> None:
        self._parts = [part for part in PARTS if part.name in args.part]
        self._budget = Budget(60 * args.minutes)
        self._out, self._args = out, args
        self._lines: list[dict[str, Any]] = []
        self._rates: dict[str, float] = {}
        self._memory: float | None = None  # of the GPU, once it is known

    def all(self) -> list[dict[str, Any]]:
        """Does the parts in their order, as far as the time goes; every line."""
        self._tell(self._machine())
        for place, part in enumerate(self._parts):
            self._part(part, self._parts[place + 1 :])
        seconds = round(self._budget.used(), 1)
        self._write("end", seconds=seconds, status=int(report.failed(self._lines)))
        return self._lines

    def _part(self, part: Part, after: Sequence[Part]) -> None:
        seconds, begun = self._budget.share(part, after), self._budget.used()
        print(f"\n{part.name}: {part.about}", flush=True)
        setting = self._setting()
        units: list[str] = []
        try:
            units = list(part.units(setting))
            if seconds:
                runner.drive(part, units, setting, seconds, self._tell, self._memory)
        except Exception as error:  # a library that it stands on is missing, say: the part fails, the others go on
            self._write("unit", part=part.name, unit="all of it", state=records.ERROR, seconds=0.0, detail=repr(error))
        for unit in () if seconds else units:
            detail = "no time was left for its part"
            self._write("unit", part=part.name, unit=unit, state=records.NOT_RUN, seconds=0.0, detail=detail)
        taken = round(self._budget.used() - begun, 1)
        states = {x["state"] for x in self._lines if x["kind"] == "unit" and x["part"] == part.name}
        self._write("part", part=part.name, state=records.together(states), seconds=taken, units=len(units))

    def _setting(self) -> Setting:
        if self._args.dry_run:
            return Setting("cpu", self._args.impl or "reference", True, self._rates)
        return Setting("cuda", self._args.impl, self._args.quick, self._rates)

    def _machine(self) -> dict[str, Any]:
        known = machine.facts()
        known["versions"] |= {name: machine.version(name) for name in _PACKAGES}
        more = {
            "benchmark": "gpu-check", "quick": self._setting().quick, "device": self._setting().device,
            "gpu": nvidia_smi(), "minutes": self._args.minutes, "parts": [part.name for part in self._parts],
        }  # fmt: skip
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if version)
        print(f"{more['gpu'] or more['device']}\n{versions}, commit {known['commit']}", flush=True)
        return {"schema": SCHEMA, "kind": "machine", **known, **more}

    def _write(self, kind: str, **values: Any) -> None:
        self._tell({"schema": SCHEMA, "kind": kind, **values})

    def _tell(self, line: dict[str, Any]) -> None:
        """Keeps a line, writes it, and prints what people want to see at once."""
        self._lines.append(line)
        if line["kind"] == "ceiling":
            self._rates[line["what"]] = line["rate"]
        if line["kind"] == "gpu" and line["memory"]:
            self._memory = line["memory"]
        if self._out is not None:
            self._out.write(records.text(line))
            self._out.flush()
        shown = report.progress(line)
        if shown:
            print(shown, flush=True)


def nvidia_smi() -> str | None:
    """Driver, clocks, temperature and power, as the driver's own tool tells them; None without it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of minutes")
    return value
