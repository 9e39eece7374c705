"""Time on a device: samples of many calls between two events, contestants in turns, calls recorded into a graph.

`eager`: calls as Python makes them, one after the other. `graph`: the same calls recorded once and replayed, so that
only the device counts. `warm`: one set of inputs. `cold`: every call reads another set, out of as many as are together
more than twice the L2 cache.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import Sample

Run = Callable[[], Any]
_AHEAD = 200_000  # cycles the device is kept busy while a graph's launch is queued
_WARM = 3  # calls before anything is timed or recorded
_MOST_SETS = 64
_FAR = 4  # times the cache that inputs are cold by themselves
_SHARE = 0.25  # of the free memory that copies of inputs may take


@dataclass
class Timed:
    """What is sampled: `run` does `calls` calls; `result` is where the last of them left its results."""

    run: Run
    calls: int
    result: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ahead: bool = False


def seconds(run: Run, device: str, ahead: bool = False) -> float:
    """What a run takes from its first kernel's start to its last one's end.

    With `ahead` the device is busy while the run is queued, so that the launch itself does not count.
    """
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(_AHEAD)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def eager(runs: Sequence[Run], device: str, least: float, around: Callable[[], Any] = nullcontext) -> Timed:
    """Calls of the runs in turn, as many as take about `least` seconds, and each of them equally often."""
    with around():
        once = _look(runs, device)
    calls = len(runs) * max(1, math.ceil(least / max(once * len(runs), 1e-9)))
    last: list[Any] = [None]

    def run() -> None:
        for i in range(calls):
            last[0] = runs[i % len(runs)]()

    return Timed(run, calls, lambda: last[0], around)


def graph(runs: Sequence[Run], device: str, least: float, around: Callable[[], Any] = nullcontext) -> Timed:
    """The same as a CUDA graph. Recording needs kernels that are loaded, which calls on another stream see to."""
    with around():
        once = _look(runs, device)
        calls = len(runs) * max(1, math.ceil(least / max(once * len(runs), 1e-9)))
        record, result = captured(lambda: [runs[i % len(runs)]() for i in range(calls)][-1])
    return Timed(record.replay, calls, lambda: result, ahead=True)


def captured(run: Run) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A run as a graph, and its results, which every replay writes again."""
    usual, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            run()
    usual.wait_stream(side)
    torch.cuda.synchronize()
    record = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(record):
            result = run()
    finally:
        torch.cuda.set_stream(usual)  # a recording that fails leaves its own stream behind
    return record, result


def interleave(runs: Mapping[str, Timed], rounds: int, device: str) -> dict[str, list[Sample]]:
    """Every contestant once a round, in an order that turns round every time; seconds of one call."""
    for timed in runs.values():
        with timed.around():
            timed.run()
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else list(reversed(runs)):
            timed, cpu = runs[name], time.process_time()
            with timed.around():
                wall = seconds(timed.run, device, timed.ahead) / timed.calls
            samples[name].append(Sample(turn, wall, (time.process_time() - cpu) / timed.calls, 0.0))
    return samples


def set_count(size: float, device: str) -> int:
    """Sets of inputs of `size` bytes that are together more than twice the cache; 2 where nothing is known of it."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if size >= _FAR * cache:  # the end of a call drives out what its next one begins with
        return 1
    room = _SHARE * torch.cuda.mem_get_info()[0]
    return max(1, min(_MOST_SETS, 1 + math.ceil(2 * cache / size), int(room / size)))


def release() -> None:
    """Gives memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _look(runs: Sequence[Run], device: str) -> float:
    """About how long one call takes."""
    for run in runs:
        run()
    for _ in range(_WARM):
        runs[0]()
    return min(seconds(runs[0], device) for _ in range(3))
