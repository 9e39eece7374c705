"""What benchmarks do around what they measure: threads, a journal, waiting for a quiet machine, checks that are red."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bench import machine, measure
from bench.measure import Journal


@contextmanager
def opened(args: argparse.Namespace, benchmark: str, **about: Any) -> Iterator[Journal]:
    """A run's journal, in `args.out` or nowhere, from the machine's line to the load at its end.

    Meanwhile torch has as many threads as `args.threads` says, one where the benchmark has no such option.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(args, "threads", 1))
    quick = {"quick": args.quick} if hasattr(args, "quick") else {}
    try:
        with args.out.open("a") if args.out else nullcontext() as out:
            journal, here = Journal(out), machine.facts()
            journal.write("machine", benchmark=benchmark, **quick, **about, **here)
            print(f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, load {here['load']}", flush=True)
            yield journal
            journal.write("end", load=machine.load())
    finally:
        torch.set_num_threads(before)


def wait(seconds: float) -> None:
    """Waits up to `seconds` for other processes to pause, and says so where they do not."""
    if seconds and not measure.wait_until_quiet(seconds):
        print("  other processes keep the machine busy: times will be noisy", flush=True)


def red(journal: Journal, error: Exception, **where: str) -> None:
    """Keeps and tells a check that failed: nothing of what it was about is shown."""
    journal.write("check", **where, green=False, error=str(error))
    print(f"{'  '.join(where.values())}: CHECK FAILED, no ratios: {error}", file=sys.stderr)
