"""From nothing to the first mixed batch: what README's first command takes in a fresh clone, downloads included.

The committed state is cloned into a temporary folder, and every step of `make demo` is timed there: the environment
with torch, the installation of fastprompt with its kernels, the demo itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import options, session
from bench.checkout import ROOT
from bench.measure import CheckFailed
from bench.outcome import VERDICTS

STEPS = {
    "torch": ".venv/.torch",
    "fastprompt": ".venv/.installed",
    "demo": "demo",
}  # what make makes, one after the other
_INHERITED = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL")  # of whoever measures
_MOST = 300.0  # seconds
_TOLD = 2000  # characters of a failed step's output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench quickstart`."""
    options.add(parser, "wait", "out")


def run(args: argparse.Namespace) -> int:
    """Prints and writes the seconds of each step; 1 where one failed or all of them took too long."""
    with session.opened(args, "quickstart") as journal, TemporaryDirectory() as folder:
        session.wait(args.wait)
        try:
            taken = steps(ROOT, Path(folder) / "clone")
        except CheckFailed as error:
            session.red(journal, error)
            return 1
        total = sum(taken.values())
        met = total <= _MOST
        journal.write("quickstart", seconds=taken, total=total, most=_MOST, met=met)
        for name, seconds in taken.items():
            print(f"  {name:12} {seconds:6.1f} s")
        print(f"  {'all':12} {total:6.1f} s  target <= {_MOST:g} s{VERDICTS[met]}")
    return 0 if met else 1


def steps(source: Path, clone: Path) -> dict[str, float]:
    """Seconds of cloning `source` and of each step in the clone. Raises CheckFailed where one of them fails."""
    venv = (Path(os.environ["VIRTUAL_ENV"]) / "bin").as_posix() if "VIRTUAL_ENV" in os.environ else None
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != venv)
    environment = {k: v for k, v in os.environ.items() if k not in _INHERITED} | {"PATH": path}
    taken = {"clone": _seconds(["git", "clone", "--quiet", str(source), str(clone)], source, environment)}
    for name, made in STEPS.items():
        taken[name] = _seconds(["make", made], clone, environment)
    return taken


def _seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise CheckFailed(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout[-_TOLD:]}")
    return time.perf_counter() - begin
