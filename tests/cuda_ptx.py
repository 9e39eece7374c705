"""The CUDA decode kernels as nvcc compiles them, run by `ptx_machine`, with the interface of `cuda_machine.Machine`."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from cuda_compiled import ROOT, nvcc
from cuda_machine import Args, Chip, Copies, Machine, Schedule
from ptx_machine import Copies as When
from ptx_machine import Kernel, Memory, launch, parse
from torch import Tensor

_MERGE_WARPS = 4


class _Call(ctypes.Structure):
    """`fastprompt::cuda::Call`, the kernels' parameter."""

    _fields_ = [("args", Args), ("schedule", Schedule)]


@dataclass(frozen=True)
class PtxMachine:
    """Kernels by (kernel, dtype, head size); a host machine makes the schedules."""

    host: Machine
    kernels: dict[tuple[str, int, int], Kernel]
    capability: int  # of the GPU it was compiled for
    order: int | None = None

    @classmethod
    def compile(cls, host: Machine, target: str, folder: Path) -> PtxMachine:
        """For a target of nvcc's, such as sm_90a."""
        kernels = {}
        for number, dtype in enumerate(("bf16", "fp16")):
            text = compile_ptx(ROOT / "csrc" / "cuda" / f"decode_{dtype}.cu", target, folder)
            for kernel in parse(text):
                dim = int(re.search(r"Li(\d+)E", kernel.name)[1])
                kernels["merge" if "merge" in kernel.name else "decode", number, dim] = kernel
        return cls(host, kernels, int(re.sub(r"\D", "", target)))

    def in_order(self, seed: int) -> PtxMachine:
        """One warp runs at a time, as far as it can, in an order of its own."""
        return replace(self, order=seed)

    def schedule(self, args: Args, on: Chip) -> Schedule | int:
        return self.host.schedule(args, on)

    def run(self, args: Args, schedule: Schedule, copies: Copies = Copies.EAGER, seed: int = 0) -> None:
        memory = Memory()
        call = _Call(_elsewhere(args, memory), schedule)
        call.args.workspace, call.args.workspace_bytes = (
            memory.allocate(schedule.workspace_bytes),
            schedule.workspace_bytes,
        )
        dtype, dim = args.dtype, args.head_dim
        when = When.EARLY if copies == Copies.EAGER else When.LATE
        decode, merge = (self.kernels[name, dtype, dim] for name in ("decode", "merge"))
        launch(
            decode,
            memory,
            bytes(call),
            schedule.blocks,
            32 * schedule.warps,
            schedule.shared_bytes,
            when=when,
            seed=self.order,
        )
        if schedule.merge_blocks:
            launch(merge, memory, bytes(call), schedule.merge_blocks, 32 * _MERGE_WARPS, when=when, seed=self.order)
        memory.fetch()


def compile_ptx(source: Path, target: str, folder: Path) -> str:
    """What nvcc makes of a file before ptxas sees it."""
    compiler, out = nvcc(), folder / f"{source.stem}.{target}.ptx"
    assert compiler is not None
    command = [
        compiler,
        "-ptx",
        "-std=c++17",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        f"-arch={target}",
        str(source),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_text()


def _elsewhere(args: Args, memory: Memory) -> Args:
    """Arguments whose tensors lie in the machine's memory; only results may be written."""
    moved = Args.from_buffer_copy(args)
    tensors: dict[str, Tensor | None] = args.tensors
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        address = memory.place(tensor, writable=name in ("out", "lse"))
        if name == "sharing":
            moved.tiles = address + args.tiles - tensor.data_ptr()
            moved.tile_of_row = address
        else:
            setattr(moved, name, address)
    return moved
