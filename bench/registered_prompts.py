"""What a registry with many names costs against one with few: opening, listing, and a request's look at its prompt.

The names hold one prompt, hard-linked, so that the disk holds it once; eight of them hold others and are resident.
A request's cost is the lease of a resident prompt (`acquire` and `release`), timed in one interleaved run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count, cycle
from pathlib import Path

from bench import measure, options, session
from bench.measure import Contestant, Spread
from fastprompt import PromptedModel, demo
from fastprompt.prompt_format import prompt_files
from fastprompt.prompts import PrefixTuning
from fastprompt.serving.listing import SETTLED_NS
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency

_RESIDENT = 8
_LINKS = 10_000  # names a file is linked to before a fresh one is written: file systems bound the number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench registered-prompts`."""
    parser.add_argument(
        "--names", type=int, nargs=2, default=(10, 100_000), metavar="N", help="the two registries' sizes"
    )
    parser.add_argument("--calls", type=int, default=2000, help="leases in a round (default: 2000)")
    options.add(parser, "out", rounds=21)


def run(args: argparse.Namespace) -> int:
    """Prints what was measured; 0, since nothing is judged."""
    backbone = PromptedModel(demo.backbone())._info
    shape = backbone.spec
    stored = [prompt_files(PrefixTuning(num_virtual_tokens=16).build(shape, seed=i)) for i in range(_RESIDENT + 1)]
    residencies: dict[str, Residency] = {}
    with session.opened(args, "registered-prompts") as journal, tempfile.TemporaryDirectory() as folder:
        for size in args.names:
            root = Path(folder, str(size))
            _fill(root, size, stored)
            time.sleep(2 * SETTLED_NS / 1e9)  # what is younger is looked at again each time
            registry = PromptRegistry(root, shape)
            for what, seconds in _once(root, registry).items():
                journal.write("seconds", names=size, what=what, **asdict(seconds))
                print(f"  {size:7} names: {what:36} {seconds.median * 1e6:12.1f} us", flush=True)
            residencies[str(size)] = residency = Residency(backbone, registry, device_bytes=64 << 20)
            for i in range(_RESIDENT):
                _wait(residency, f"p{i:06}")
        runs = {name: Contestant(_leases(r), lambda _: None, calls=args.calls) for name, r in residencies.items()}
        samples = measure.interleave(runs, args.rounds)
        few, many = map(str, args.names)
        ratio = measure.ratio(samples, many, few)
        journal.samples("lease", samples)
        journal.write("ratio", case="lease", **asdict(ratio))
        for name, each in samples.items():
            spread = Spread.of([sample.wall for sample in each])
            print(f"  {name:>7} names: lease of a resident prompt           {spread.median * 1e6:12.1f} us")
        print(f"  {many} / {few}: {ratio.wall.median:.3f} [{ratio.wall.p20:.3f}, {ratio.wall.p80:.3f}]")
        for residency in residencies.values():
            residency.close()
    return 0


def _fill(root: Path, names: int, stored: list[dict[str, bytes]]) -> None:
    """`names` prompts, of which the first few differ."""
    source = root
    for i in range(names):
        folder = root / f"p{i:06}"
        folder.mkdir(parents=True)
        own = stored[min(i, _RESIDENT)]
        if i <= _RESIDENT or i % _LINKS == 0:
            source = folder
            for name, content in own.items():
                (folder / name).write_bytes(content)
        else:
            for name in own:
                os.link(source / name, folder / name)


def _once(root: Path, registry: PromptRegistry) -> dict[str, Spread]:
    """Things that are not done for every request."""
    names = iter(registry.names())
    first = registry.names()[0]

    ages = count(1)

    def changed() -> None:
        os.utime(root, (next(ages), next(ages)))
        registry.refresh()

    return {
        "open": _time(lambda: PromptRegistry(root, registry.spec), 5),
        "refresh, the folder changed": _time(changed, 5),
        "refresh, nothing changed": _time(registry.refresh, 200),
        "a page of 100 names": _time(lambda: registry.names("p000003", 100), 200),
        "current, first time": _time(lambda: registry.current(next(names)), min(len(registry), 200)),
        "current, again": _time(lambda: registry.current(first), 200),
    }


def _time(act: Callable[[], object], times: int) -> Spread:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return Spread.of(seconds)


def _wait(residency: Residency, name: str) -> None:
    while (lease := residency.acquire(name)) is None:
        residency.progress()
        time.sleep(0.001)
    lease.release()


def _leases(residency: Residency) -> Callable[[], None]:
    names = cycle([f"p{i:06}" for i in range(_RESIDENT)])

    def take() -> None:
        lease = residency.acquire(next(names))
        assert lease is not None
        lease.release()

    return take
