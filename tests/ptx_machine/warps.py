"""Instructions of whole warps: lanes read each other's registers, matrices in shared memory, tensor cores.

Which lane holds which element is what the ISA's figures show ("Matrix fragments for mma.m16n8k16", "ldmatrix"). Every
lane of a warp takes part, which `launch` sees to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import TYPES, Run, from_half, maker
from .memory import Array
from .moves import address
from .program import Instruction

WARP = 32
_LANE = np.arange(WARP)
WARP_WIDE = {"shfl", "vote", "redux", "ldmatrix", "stmatrix", "mma", "wgmma"}  # and bar.warp.sync


@maker("shfl")
def shuffle(launch: Any, ins: Instruction) -> Run:
    how = ins.opcode[2]
    name, _, found = str(ins.operands[0]).partition("|")  # a number, and whether its lane is in the segment
    out, given = launch.write(name, TYPES["b32"]), launch.read(ins.operands[1], TYPES["b32"])
    there = launch.write(found or "_", TYPES["pred"])
    by, clamp = (launch.read(x, TYPES["s32"]) for x in ins.operands[2:4])

    def run(mask: Any) -> None:
        lane = np.broadcast_to(_LANE, (launch.lanes // WARP, WARP)).reshape(-1)
        segment, last = clamp >> 8 & 31, clamp & 31
        least = lane & segment
        most = least | (last & ~segment)
        source = {
            "idx": lambda: least | (by & ~segment & 31), "bfly": lambda: lane ^ by, "up": lambda: lane - by,
            "down": lambda: lane + by,
        }[how]()  # fmt: skip
        inside = source >= most if how == "up" else source <= most
        source = np.where(inside, source, lane)
        np.copyto(there, inside, where=mask)
        np.copyto(out, given.reshape(-1, WARP)[np.arange(launch.lanes) // WARP, source], where=mask)

    return run


@maker("vote")
def ballot(launch: Any, ins: Instruction) -> Run:
    assert ins.opcode[2] == "ballot", ins.text
    out, given = launch.write(ins.operands[0], TYPES["b32"]), launch.read(ins.operands[1], TYPES["pred"])

    def run(mask: Any) -> None:
        bits = np.broadcast_to(given, launch.lanes).reshape(-1, WARP) & launch.mask(mask).reshape(-1, WARP)
        found = (bits.astype(np.uint64) << _LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        np.copyto(out, np.repeat(found, WARP), where=mask)

    return run


@maker("redux")
def reduce(launch: Any, ins: Instruction) -> Run:
    f, dtype = {"add": np.add, "max": np.maximum, "min": np.minimum}[ins.opcode[2]], TYPES[ins.opcode[-1]]
    out, given = launch.write(ins.operands[0], dtype), launch.read(ins.operands[1], dtype)

    def run(mask: Any) -> None:
        found = f.reduce(given.reshape(-1, WARP), axis=1, dtype=dtype)
        np.copyto(out, np.repeat(found, WARP), where=mask)

    return run


def _matrices(ins: Instruction) -> int:
    return int(next(m for m in ins.opcode if m in ("x1", "x2", "x4"))[1:])


def _rows(launch: Any, at: Any, count: int, mask: Any) -> tuple[Array, Array, Array]:
    """Blocks and addresses of the 8 rows of each of a warp's matrices, one after the other, and which are wanted."""
    lanes = (launch.block, at(), launch.mask(mask))
    blocks, rows, wanted = (x.reshape(-1, WARP)[:, : 8 * count].reshape(-1) for x in lanes)
    return blocks, rows, wanted


@maker("ldmatrix")
def load_matrices(launch: Any, ins: Instruction) -> Run:
    count, at = _matrices(ins), address(launch, ins.operands[1])
    assert isinstance(ins.operands[0], tuple)
    outs = [launch.write(x, TYPES["b32"]) for x in ins.operands[0]]
    transposed = ins.has("trans")

    def run(mask: Any) -> None:
        blocks, rows, wanted = _rows(launch, at, count, mask)
        words = launch.shared.load_in(blocks, rows, np.dtype("u4"), 4, wanted)
        launch.count(launch.shared, rows, 16, wanted)
        halves = np.stack(words, -1).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        pairs = halves.view(np.uint32).reshape(-1, count, WARP)  # lane 4r + c has columns 2c and 2c + 1 of row r
        for i, out in enumerate(outs):
            np.copyto(out, pairs[:, i].reshape(-1), where=mask)

    return run


@maker("stmatrix")
def store_matrices(launch: Any, ins: Instruction) -> Run:
    count, at = _matrices(ins), address(launch, ins.operands[0])
    assert isinstance(ins.operands[1], tuple)
    given = [launch.read(x, TYPES["b32"]) for x in ins.operands[1]]
    transposed = ins.has("trans")

    def run(mask: Any) -> None:
        blocks, rows, wanted = _rows(launch, at, count, mask)
        pairs = np.stack([x.reshape(-1, WARP) for x in given], 1)
        halves = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(2, 3))
        words = halves.reshape(-1, 8).view(np.uint32)
        launch.shared.store_in(blocks, rows, [words[:, i] for i in range(4)], wanted)
        launch.count(launch.shared, rows, 16, wanted)

    return run


def halves(registers: list[Array], dtype: str) -> Array:
    """The numbers of lanes' registers of two halves each: `[warps, lanes, 2 registers]`."""
    bits = np.stack([np.ascontiguousarray(np.broadcast_to(x, x.shape)) for x in registers], -1)
    return from_half(bits.view(np.uint16), dtype).reshape(-1, WARP, 2 * len(registers))


_GROUP, _PLACE = _LANE // 4, _LANE % 4
A_ROWS = np.stack([_GROUP + 8 * (i // 2 % 2) for i in range(8)], 1)  # of the eight numbers of a lane
A_COLUMNS = np.stack([2 * _PLACE + i % 2 + 8 * (i // 4) for i in range(8)], 1)
_B_ROWS = np.stack([2 * _PLACE + i % 2 + 8 * (i // 2) for i in range(4)], 1)
_B_COLUMNS = np.stack([_GROUP] * 4, 1)
_D_ROWS = np.stack([_GROUP + 8 * (i // 2) for i in range(4)], 1)
_D_COLUMNS = np.stack([2 * _PLACE + i % 2 for i in range(4)], 1)


@maker("mma")
def multiply(launch: Any, ins: Instruction) -> Run:
    """d [16, 8] = a [16, 16] . b [16, 8] + c; products are summed in float64 and rounded once."""
    shape, dtype = ins.opcode[3], ins.opcode[7]
    assert shape == "m16n8k16" and ins.opcode[4:7] == ("row", "col", "f32"), ins.text
    outs = [launch.write(x, TYPES["f32"]) for x in ins.operands[0]]
    a, b = ([launch.read(x, TYPES["b32"]) for x in ins.operands[i]] for i in (1, 2))
    c = [launch.read(x, TYPES["f32"]) for x in ins.operands[3]]

    def run(mask: Any) -> None:
        warps = launch.lanes // WARP
        left, right = np.empty((warps, 16, 16)), np.empty((warps, 16, 8))
        left[:, A_ROWS, A_COLUMNS] = halves(a, dtype)
        right[:, _B_ROWS, _B_COLUMNS] = halves(b, dtype)
        product = (left @ right)[:, _D_ROWS, _D_COLUMNS].reshape(-1, 4)
        for i, out in enumerate(outs):
            np.copyto(out, product[:, i] + c[i], where=mask, casting="same_kind")

    return run
