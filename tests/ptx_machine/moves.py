"""Instructions that move numbers: between registers, and to and from memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import TYPES, Run, maker
from .memory import Array, PtxError
from .program import Address, Instruction


@maker("mov")
def move(launch: Any, ins: Instruction) -> Run:
    to, of = ins.operands
    dtype = TYPES[ins.opcode[-1].replace("f", "u")] if ins.opcode[-1] != "pred" else TYPES["pred"]
    if isinstance(to, tuple):
        return _unpack(launch, to, launch.read(of, dtype))
    if isinstance(of, tuple):
        return _pack(launch, launch.write(to, dtype), of)
    out, given = launch.write(to, dtype), launch.read(of, dtype)
    return lambda mask: np.copyto(out, given, where=mask)


def _unpack(launch: Any, to: tuple[str, ...], given: Array) -> Run:
    part = np.dtype(f"u{given.dtype.itemsize // len(to)}")
    outs, halves = [launch.write(x, part) for x in to], given.view(part)

    def run(mask: Any) -> None:
        values = [halves[i :: len(outs)].copy() for i in range(len(outs))]
        for out, value in zip(outs, values, strict=True):
            np.copyto(out, value, where=mask)

    return run


def _pack(launch: Any, out: Array, of: tuple[str, ...]) -> Run:
    part = np.dtype(f"u{out.dtype.itemsize // len(of)}")
    given = [launch.read(x, part) for x in of]
    bits = 8 * part.itemsize

    def run(mask: Any) -> None:
        value = sum(np.asarray(x).astype(out.dtype) << out.dtype.type(bits * i) for i, x in enumerate(given))
        np.copyto(out, value, where=mask)

    return run


@maker("cvta")
def convert_address(launch: Any, ins: Instruction) -> Run:
    """Generic addresses are those of global memory; those of shared memory lie elsewhere, by `launch.generic`."""
    dtype = TYPES[ins.opcode[-1]]
    out, given = launch.operands(ins, dtype)
    away = launch.generic if ins.has("shared") else 0
    return lambda mask: np.copyto(
        out, given - dtype.type(away) if ins.has("to") else given + dtype.type(away), where=mask
    )


def space(launch: Any, ins: Instruction) -> Any:
    """What kind of memory an instruction reads or writes."""
    for name in ("global", "shared", "param"):
        if any(m.split("::")[0] == name for m in ins.opcode):
            return getattr(launch, name if name != "global" else "memory")
    raise PtxError(f"generic addresses are not supported: {ins.text}")


def address(launch: Any, operand: Any) -> Any:
    """The lanes' addresses, of 64 bits."""
    assert isinstance(operand, Address)
    base, offset = launch.read(operand.base, launch.stored(operand.base)), np.uint64(operand.offset % (1 << 64))
    if np.ndim(base) == 0:
        base = np.full(launch.lanes, base)
    return lambda: base.astype(np.uint64) + offset


def _count(ins: Instruction) -> int:
    return next((int(m[1:]) for m in ins.opcode if m in ("v2", "v4", "v8")), 1)


@maker("ld")
def load(launch: Any, ins: Instruction) -> Run:
    dtype, at, of = TYPES[ins.opcode[-1]], address(launch, ins.operands[1]), space(launch, ins)
    to = ins.operands[0] if isinstance(ins.operands[0], tuple) else (ins.operands[0],)
    outs = [launch.write(x, launch.stored(x)) for x in to]

    def run(mask: Any) -> None:
        lanes, where = launch.mask(mask), at()
        found = of.load(where, dtype, len(outs), lanes)
        launch.count(of, where, dtype.itemsize * len(outs), lanes)
        for out, value in zip(outs, found, strict=True):
            bits = value if value.dtype.itemsize < out.dtype.itemsize else value.view(out.dtype)
            np.copyto(out, bits, where=mask, casting="unsafe")

    assert _count(ins) == len(to), ins.text
    return run


@maker("st")
def store(launch: Any, ins: Instruction) -> Run:
    dtype, at, of = TYPES[ins.opcode[-1]], address(launch, ins.operands[0]), space(launch, ins)
    values = ins.operands[1] if isinstance(ins.operands[1], tuple) else (ins.operands[1],)
    given = [np.asarray(launch.read(x, dtype)) for x in values]
    assert _count(ins) == len(values), ins.text

    def run(mask: Any) -> None:
        lanes, where = launch.mask(mask), at()
        of.store(where, given, lanes)
        if of is launch.shared:
            launch.count(of, where, dtype.itemsize * len(given), lanes)

    return run
