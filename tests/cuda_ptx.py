"""The CUDA decode kernels as nvcc compiles them, run by `ptx_machine`, with the interface of `cuda_machine.Machine`.

`PYTHONPATH=. python tests/cuda_ptx.py record` counts what they ask of memory, into bench/results/cuda_counts.csv.
"""

from __future__ import annotations

import csv
import ctypes
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cuda_cases import Batch, batch, check
from cuda_compiled import ROOT, nvcc
from cuda_machine import SHARERS, Args, Chip, Copies, Loads, Machine, Schedule, chip
from ptx_machine import Copies as When
from ptx_machine import Counts, Kernel, Memory, launch, parse
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
    counts: Counts | None = None

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

    def counting(self) -> PtxMachine:
        """What is run from now on is counted in `counts`."""
        return replace(self, counts=Counts())

    def schedule(self, args: Args, on: Chip) -> Schedule | int:
        return self.host.schedule(args, on)

    def run(self, args: Args, schedule: Schedule, copies: Copies = Copies.EAGER, seed: int = 0) -> None:
        memory = Memory()
        call = _Call(_elsewhere(args, memory), schedule)
        call.args.workspace = memory.allocate(schedule.workspace_bytes)
        call.args.workspace_bytes = schedule.workspace_bytes
        dtype, dim = args.dtype, args.head_dim
        when = When.EARLY if copies == Copies.EAGER else When.LATE
        decode, merge = (self.kernels[name, dtype, dim] for name in ("decode", "merge"))
        how = {"when": when, "seed": self.order, "counts": self.counts}
        launch(decode, memory, bytes(call), schedule.blocks, 32 * schedule.warps, schedule.shared_bytes, **how)
        if schedule.merge_blocks:
            launch(merge, memory, bytes(call), schedule.merge_blocks, 32 * _MERGE_WARPS, **how)
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


RECORD = ROOT / "bench" / "results" / "cuda_counts.csv"


def floor(b: Batch, shares: bool) -> int:
    """Bytes of the keys and values of a batch in 16 bits, those of a prefix once for each tile of rows."""
    own, prefix, (_, _, kv_heads, dim) = b.tensors[5], b.tensors[9], b.tensors[1].shape
    keys = int(own.sum())
    if shares and b.sharing is not None:
        tiles, rest = divmod(len(b.sharing), 4 + SHARERS)
        first = b.sharing[4 * tiles + rest :].view(-1, SHARERS)[:, 0]
        keys += int(prefix[first[first >= 0]].sum() + prefix[b.sharing[: len(own)] < 0].sum())
    else:
        keys += int(prefix.sum())
    return 4 * keys * kv_heads * dim


def count(machine: PtxMachine, b: Batch, loads: Loads, multiprocessors: int = 4) -> dict[str, Any]:
    """A checked call: what it loads over the least it could, and what it takes for 16 keys of a key-value head."""
    counting = machine.counting()
    schedule = check(counting, b, on=chip(machine.capability, multiprocessors), loads=loads, copies=Copies.EAGER)
    found, least = counting.counts, floor(b, schedule.shared_parts > 0)
    slices = least / (4 * 16 * b.tensors[0].shape[2])
    return {
        "bytes": least,
        "moved": round(found.moved / least, 3),
        "rounds": round(found.rounds / found.least, 3),
        "instructions": round((found.instructions.total() - found.instructions["mov"]) / slices),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """Rows that read alone and rows that read a prefix together, both ways to load."""
    machine, found = PtxMachine.compile(Machine.build(folder), "sm_90a", folder), []
    for dim in (64, 128):
        cases = {
            "4 rows alone, P 256, S 512": batch([(0, 256)] * 4, [512] * 4, heads=(8, 2), dim=dim, tokens=256),
            "16 rows together, P 2048, S 64": batch(
                [(0, 2048)] * 16, [64] * 16, heads=(8, 2), dim=dim, tokens=2048, together=[list(range(16))]
            ),
        }
        for case, b in cases.items():
            for loads in (Loads.ASYNC, Loads.BULK):
                found.append({"case": case, "head_dim": dim, "loads": loads.name, **count(machine, b, loads)})
    return found


if __name__ == "__main__":
    assert sys.argv[1:] == ["record"], __doc__
    with tempfile.TemporaryDirectory() as scratch:
        made = lines(Path(scratch))
    with RECORD.open("w") as file:
        writer = csv.DictWriter(file, made[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
