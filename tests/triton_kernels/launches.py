"""Checks that launches remembered by `fastprompt._triton.launch` are those that Triton itself would make.

A driver stands in for a GPU's: it loads nothing, and notes what it is asked to launch. Must run where TRITON_INTERPRET
is not set; exits with an error where a launch differs.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from compiled import TARGETS
from triton.runtime import driver

from fastprompt._triton.launch import Launches
from fastprompt._triton.tiles import Tiles


@triton.jit
def kernel(x, y, steps, n, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    i = tl.arange(0, BLOCK)
    found = tl.load(x + i * steps[0] + steps[1], mask=i < n, other=0.0) * scale
    if y is not None and FLAG:
        found += tl.load(y + i)
    tl.store(x + i, found)


class Driver:
    """Notes launches: grid, stream, binary, and all arguments."""

    def __init__(self) -> None:
        self.noted: list[tuple[Any, ...]] = []
        self.stream = 7
        self.utils = self
        self.get_current_target = lambda: TARGETS["sm_90"]
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: self.stream
        self.get_device_properties = lambda device: {"max_shared_mem": 227 << 10}
        self.load_binary = lambda name, binary, shared, device: (binary, hash(binary), 0, 0, 1024)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def note(*given: Any) -> None:
            x, y, z, stream, function, packed, _metadata, _enter, _exit, *args = given
            pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            self.noted.append((x, y, z, stream, function, packed, pointers))

        return note


def check() -> int:
    """Launches of all kinds, each by Triton and twice by `Launches`; how many there were."""
    recorder = Driver()
    driver.set_active(recorder)
    launches = Launches(most=40)
    room = torch.zeros(64)
    half = room.half()
    tensors = [room, room[1:], room[4:], half, half[8:]]
    calls = product(tensors, (None, 0), ((1, 16), (3, 5)), (1, 16, 17, 2**40), (0.5,), ((32, 4), (64, 8)))
    count = 0
    for x, other, steps, n, scale, (block, warps) in calls:
        recorder.stream += 1
        args = (x, None if other is None else x, steps, n, scale)
        meta = {"FLAG": True, "BLOCK": block}
        kernel[(5,)](*args, **meta, num_warps=warps, num_stages=1)
        for _ in range(2):
            launches.run(kernel, 5, 0, Tiles(0, 0, warps, 1), args, meta)
        usual, first, again = recorder.noted
        assert usual == first == again, (args, usual, first, again)
        recorder.noted.clear()
        count += 1
    assert len(launches._known) <= 40
    return count


if __name__ == "__main__":
    print(check())
