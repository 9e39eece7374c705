"""Kernels compiled ahead of time for GPUs that are not here.

An op's own launcher runs on tensors without storage, and every launch becomes a compilation for the target: what is
compiled is exactly what a machine with that GPU would run. Must be imported where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastprompt._triton import launch, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_MACHINES = {"sm_80": "cuda", "sm_90": "large", "sm_100": "large", "gfx942": "hip"}  # columns of the table
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes of its chip; `stack` and `spilled` are bytes a thread and registers."""

    kernel: str
    target: str
    warps: int
    stages: int
    registers: int
    spilled: int
    stack: int
    shared: int
    listing: str


class _Elsewhere:
    """Stands in for the driver of a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@contextmanager
def compiling(target: str, folder: Path) -> Iterator[list[Compiled]]:
    """Collects what is launched meanwhile, compiled for this target; `folder` is scratch space."""
    found: list[Compiled] = []

    def launched(kernel: Any, programs: int, on: Any, tile: tiles.Tiles, *args: Any, **meta: Any) -> None:
        kernel.device_caches.clear()  # keyed by device, of which there is one here for all targets
        binary = kernel.run(*args, **meta, grid=(programs,), warmup=True, num_warps=tile.warps, num_stages=tile.stages)
        read = _nvidia if TARGETS[target].backend == "cuda" else _amd
        found.append(Compiled(kernel.__name__, target, tile.warps, tile.stages, *read(binary, folder)))

    with elsewhere(target, launched):
        yield found


@contextmanager
def elsewhere(target: str, launched: Callable[..., None]) -> Iterator[None]:
    """The ops' launchers see a machine with this GPU, and `launched` takes what they launch."""
    users = [m for m in _modules() if hasattr(m, "launch") and m is not launch]
    with _patched(users, launched), mock.patch.object(tiles, "_machine", return_value=_MACHINES[target]):
        driver.set_active(_Elsewhere(TARGETS[target]))
        try:
            yield
        finally:
            driver._active = None


@contextmanager
def _patched(users: list[Any], launched: Callable[..., None]) -> Iterator[None]:
    kept = [m.launch for m in users]
    for module in users:
        module.launch = launched
    try:
        yield
    finally:
        for module, one in zip(users, kept, strict=True):
            module.launch = one


def _modules() -> list[Any]:
    import importlib

    from fastprompt import dispatch

    ops = [op for op in dispatch.OPS if (op, "triton") in dispatch._table]
    return [importlib.import_module(f"fastprompt._triton.{op}") for op in ops]


def _nvidia(binary: Any, folder: Path) -> tuple[int, int, int, int, str]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [_TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["LOCAL"], numbers["STACK"], binary.metadata.shared, binary.asm["ptx"]


def _amd(binary: Any, folder: Path) -> tuple[int, int, int, int, str]:
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    # scalar registers spill into lanes of vector registers, which takes no memory
    return (
        number("vgpr_count"),
        number("vgpr_spill_count"),
        number("private_segment_fixed_size"),
        binary.metadata.shared,
        text,
    )
