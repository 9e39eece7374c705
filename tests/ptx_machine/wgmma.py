"""Products of four warps on matrices in shared memory (sm_90a).

Descriptors, their swizzled layouts and the lanes' fragments are as in the ISA's "Asynchronous Warpgroup Level Matrix
Multiply-Accumulate Instructions". Products happen as they are issued.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .arithmetic import TYPES, Run, from_half, maker
from .memory import Array
from .program import Instruction
from .warps import A_COLUMNS, A_ROWS, WARP, halves

GROUP = 4 * WARP
_SWIZZLED = {1: 128, 2: 64, 3: 32}  # bytes of a row, by the descriptor's highest bits


@maker("wgmma")
def multiply(launch: Any, ins: Instruction) -> Run:
    """d [64, N] = a [64, 16] . b [16, N] + d where it is asked for."""
    if ins.opcode[1] != "mma_async":  # fence, commit_group, wait_group
        return lambda mask: None
    found = re.fullmatch(r"m64n(\d+)k16", ins.opcode[4])
    assert found and ins.opcode[5] == "f32", ins.text
    columns, dtype = int(found[1]), ins.opcode[6]
    outs = [launch.write(x, TYPES["f32"]) for x in ins.operands[0]]
    a, b, keep = ins.operands[1:4]
    from_registers = isinstance(a, tuple)
    left = [launch.read(x, TYPES["b32"]) for x in a] if from_registers else launch.read(a, TYPES["u64"])
    right = launch.read(b, TYPES["u64"])
    kept = launch.read(keep, TYPES["pred"])
    signs, majors = ins.operands[4:6], [x == "1" for x in ins.operands[6:]]
    assert signs == ["1", "1"], ins.text
    majors = [False, *majors] if from_registers else majors

    def run(mask: Any) -> None:
        active = launch.mask(mask).reshape(-1, GROUP)[:, 0]
        one = _fragments(left, dtype) if from_registers else _matrix(launch, left, 64, majors[0], dtype, active)
        other = _matrix(launch, right, columns, majors[1], dtype, active)
        product = _to_lanes(one @ other.swapaxes(1, 2))
        for i, out in enumerate(outs):
            np.copyto(out, product[:, i] + np.where(kept, out, 0), where=mask, casting="same_kind")

    return run


def _fragments(registers: list[Array], dtype: str) -> Array:
    out = np.empty((registers[0].size // GROUP, 4, 16, 16))
    out[:, :, A_ROWS, A_COLUMNS] = halves(registers, dtype).reshape(-1, 4, WARP, 8)
    return out.reshape(-1, 64, 16)


def _matrix(launch: Any, descriptor: Any, rows: int, transposed: bool, dtype: str, active: Array) -> Array:
    """The `[rows, 16]` numbers of each group's matrix; transposed: neighbours in memory are of one column."""
    d = np.broadcast_to(descriptor, launch.lanes).reshape(-1, GROUP)[:, :1].astype(np.int64)[:, :, None]
    start, leading, stride = ((d >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = _SWIZZLED[int(d[active][0, 0, 0] >> 62 & 3)]
    row, column = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if transposed:
        at = start + row // (width // 2) * leading + row % (width // 2) * 2 + column // 8 * stride + column % 8 * width
    else:
        at = start + row // 8 * stride + row % 8 * width + 2 * column
    at ^= (at >> 7 & width // 16 - 1) << 4
    groups = np.arange(len(d)) * GROUP
    blocks = np.broadcast_to(launch.block[groups][:, None, None], at.shape)
    wanted = np.broadcast_to(active[:, None, None], at.shape)
    (bits,) = launch.shared.load_in(blocks.reshape(-1), at.reshape(-1), np.dtype("u2"), 1, wanted.reshape(-1))
    return from_half(bits, dtype).reshape(at.shape).astype(np.float64)


def _to_lanes(product: Array) -> Array:
    """`[groups, 64, N]` as the lanes hold it: `[lanes, N / 2]`."""
    groups, _, columns = product.shape
    # rows: warp 4, half 2, lane // 4; columns: N / 8, lane % 4, pair 2
    parts = product.reshape(groups, 4, 2, 8, columns // 8, 4, 2)
    return np.ascontiguousarray(parts.transpose(0, 1, 3, 5, 4, 2, 6)).reshape(groups * GROUP, columns // 2)
