"""What launching a Triton kernel costs the host, up to the driver: Triton's own way, and remembered.

A driver that launches nothing stands in for a GPU's, so no GPU is needed. Runs where Triton is installed. Both ways are
first shown to hand that driver the same. CPU time of one thread counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import checkout, measure, options, session
from bench.measure import CheckFailed, Contestant, Spread
from fastprompt.arguments import PrefixAttention

_CALLS = 2000  # in a row make a sample
TRITON, REMEMBERED = "by Triton", "remembered"


class Launch(NamedTuple):
    """A kernel with everything that a launcher is given for it."""

    kernel: Any
    programs: int
    tile: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench launch-cost`."""
    options.add(parser, "quick", "out", rounds=15)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 where the two ways differ, 2 without Triton."""
    try:
        import triton
    except ImportError:
        print("launch-cost needs Triton, which is not installed (make test-triton makes .venv-triton)", file=sys.stderr)
        return 2
    checkout.find_kernels()
    launch = forward_launch()
    count = len(launch.args) + len(launch.meta)
    with session.opened(args, "launch-cost", arguments=count, triton=triton.__version__) as journal:
        ways, noted = stubbed(launch)
        if noted[0] != noted[1]:
            session.red(journal, CheckFailed("the two ways hand the driver different launches"), case="launch")
            return 1
        calls = _CALLS // 100 if args.quick else _CALLS
        contestants = {name: Contestant(way, lambda _: None, calls=calls) for name, way in ways.items()}
        measure.interleave(contestants, 1)
        samples = measure.interleave(contestants, args.rounds)
        journal.samples("launch", samples)
    print(f"prefix_attention_fwd_kernel, {count} arguments, host time of a launch up to the driver:")
    for name, runs in samples.items():
        spread = Spread.of([1e6 * s.cpu for s in runs])
        print(f"  {name:10}  {spread.median:.1f} us [{spread.p20:.1f}, {spread.p80:.1f}]")
    return 0


def forward_launch() -> Launch:
    """The launch of a forward pass of prefix_attention, in half precision with 32 and 8 heads of 128."""
    from fastprompt._triton import prefix_attention, tiles

    caught: list[Launch] = []

    def catch(kernel: Any, programs: int, on: Any, tile: Any, *args: Any, **meta: Any) -> None:
        caught.append(Launch(kernel, programs, tile, args, meta))

    q, kv, arena = (
        torch.empty(*shape, dtype=torch.bfloat16) for shape in ((4, 32, 64, 128), (4, 8, 64, 128), (8, 256, 128))
    )
    start, length = (torch.full((4,), value, dtype=torch.int32) for value in (0, 256))
    machine_of = mock.patch.object(tiles, "_machine", return_value="large")
    with mock.patch.object(prefix_attention, "launch", catch), machine_of:
        call = PrefixAttention(q, kv, kv, arena, arena, start, length, *[None] * 6, True, 0.1, None, None)
        prefix_attention.forward(call, None, False)
    return caught[0]


def stubbed(launch: Launch) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """Both ways to launch, and what each hands to a driver, which from then on does nothing."""
    sys.path.append(str(checkout.ROOT / "tests" / "triton_kernels"))
    from launches import Driver
    from triton.runtime import driver

    from fastprompt._triton.launch import Launches

    class Switched(Driver):
        """Notes launches as long as it is asked to."""

        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            note = super().launcher_cls(source, metadata)
            return lambda *given: note(*given) if recording else None

    recording = [True]
    stand_in = Switched()
    driver.set_active(stand_in)
    kernel, programs, tile, args, meta = launch
    launches = Launches()
    ways: dict[str, Callable[[], Any]] = {
        TRITON: lambda: kernel[(programs,)](*args, **meta, num_warps=tile.warps, num_stages=tile.stages),
        REMEMBERED: lambda: launches.run(kernel, programs, 0, tile, args, meta),
    }
    ways[REMEMBERED]()  # the first one goes through Triton
    stand_in.noted.clear()
    for way in ways.values():
        way()
    recording.clear()
    return ways, stand_in.noted
