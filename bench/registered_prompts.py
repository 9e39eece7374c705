"""What a registry with many names costs against one with few: opening, listing, and a request's look at its prompt.

The names hold one prompt, hard-linked, so that the disk holds it once; eight of them hold others and are resident.
A request's cost is the lease of a resident prompt (`acquire` and `release`), timed in one interleaved run. Last, an
engine decodes with and without a thread beside it that looks through the larger folder again and again, as a server
does once after prompts came or went.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import count, cycle
from pathlib import Path

from bench import measure, options, session
from bench.measure import Contestant, Journal, Spread
from fastprompt import PromptedModel, demo
from fastprompt.prompt_format import prompt_files
from fastprompt.prompts import PrefixTuning
from fastprompt.serving.build import build_engine
from fastprompt.serving.engine import Engine
from fastprompt.serving.listing import REST, SETTLED_NS
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.request import Generation, SamplingParams
from fastprompt.serving.residency import Residency

_RESIDENT = 8
_TURNS = 7  # of decoding alone and beside a refresh
_NEW = 100  # tokens of a row in each of them
_LINKS = 10_000  # names a file is linked to before a fresh one is written: file systems bound the number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench registered-prompts`."""
    parser.add_argument(
        "--names", type=int, nargs=2, default=(10, 100_000), metavar="N", help="the two registries' sizes"
    )
    parser.add_argument("--calls", type=int, default=2000, help="leases in a round (default: 2000)")
    options.choice(parser, "--part", ("calls", "steps"), "what is timed")
    options.add(parser, "out", rounds=21)


def run(args: argparse.Namespace) -> int:
    """Prints what was measured; 0, since nothing is judged."""
    shape = PromptedModel(demo.backbone())._info.spec
    stored = [prompt_files(PrefixTuning(num_virtual_tokens=16).build(shape, seed=i)) for i in range(_RESIDENT + 1)]
    with session.opened(args, "registered-prompts") as journal, tempfile.TemporaryDirectory() as folder:
        roots = {size: Path(folder, str(size)) for size in args.names}
        for size, root in roots.items():
            _fill(root, size, stored)
        time.sleep(2 * SETTLED_NS / 1e9)  # what is younger is looked at again each time
        if "calls" in args.part:
            _calls(roots, args, journal)
        if "steps" in args.part:
            for what, steps in _decoding(roots[args.names[1]]).items():
                line = _points(sorted(steps))
                journal.write("pauses", what=what, count=len(steps), **line)
                print(f"  {what:51} " + ", ".join(f"{n} {1e3 * t:.2f} ms" for n, t in line.items()))
    return 0


def _calls(roots: dict[int, Path], args: argparse.Namespace, journal: Journal) -> None:
    """What calls of a registry cost with few names and with many."""
    backbone = PromptedModel(demo.backbone())._info
    residencies: dict[str, Residency] = {}
    for size, root in roots.items():
        registry = PromptRegistry(root, backbone.spec)
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


def _decoding(root: Path) -> dict[str, list[float]]:
    """Seconds of an engine's decoding steps, alone and beside a thread that refreshes without a pause."""
    engine = build_engine(demo.backbone(), root)
    ages, found = count(1), dict[str, list[float]]()
    for turn in range(2 * _TURNS):
        stop, beside = threading.Event(), turn % 2

        def refresh(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                os.utime(root, (next(ages), next(ages)))
                engine.residency.registry.refresh(REST)

        other = threading.Thread(target=refresh)
        if beside:
            other.start()
        steps = _generate(engine)
        stop.set()
        if beside:
            other.join()
        if turn > 1:  # the first ones bring the prompts
            found.setdefault("a step beside a refresh" if beside else "a step", []).extend(steps)
    engine.residency.close()
    return found


def _generate(engine: Engine) -> list[float]:
    """Seconds of every decoding step of one batch."""
    params = SamplingParams(max_tokens=_NEW, temperature=0.0, ignore_eos=True)
    for i in range(_RESIDENT):
        engine.add(Generation([5, 6, 7], f"p{i:06}", params))
    seconds = []
    while engine.busy:
        begin = time.perf_counter()
        events = engine.step()
        if len(events) == _RESIDENT:
            seconds.append(time.perf_counter() - begin)
    return seconds


def _points(ordered: list[float]) -> dict[str, float]:
    last = len(ordered) - 1
    return {"p50": ordered[last // 2], "p99": ordered[int(0.99 * last)], "longest": ordered[last]}


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
