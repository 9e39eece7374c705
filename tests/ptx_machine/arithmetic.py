"""Instructions that compute each lane's numbers from its own.

A table of makers by opcode: given a launch and an instruction, a maker returns what runs it for the lanes of a mask.
Subnormal numbers are kept where PTX would flush them, and approximations are NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import Array
from .program import Instruction

Run = Callable[[Any], None]  # a mask, or True for all lanes
TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")},
    **{"bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4")},
}
MAKERS: dict[str, Callable[[Any, Instruction], Run]] = {}


def maker(*opcodes: str) -> Callable[[Any], Any]:
    """Adds a maker to the table."""

    def add(function: Any) -> Any:
        MAKERS.update(dict.fromkeys(opcodes, function))
        return function

    return add


def number(text: str, dtype: Any) -> Any:
    """A literal: a whole number of any base, or the bits of a float after 0f or 0d."""
    if text[:2] in ("0f", "0d", "0F", "0D"):
        return np.frombuffer(bytes.fromhex(text[2:])[::-1], dtype)[0]
    value = int(text.rstrip("U"), 0)
    return dtype.type(value) if dtype.kind in "fb" else np.array(value & (1 << 64) - 1, np.uint64).astype(dtype)[()]


def to_bf16(x: Array) -> Array:
    """Bits of float32 numbers rounded to bfloat16, to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_half(bits: Array, dtype: str) -> Array:
    return from_bf16(bits) if dtype.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def to_half(x: Array, dtype: str) -> Array:
    return to_bf16(x) if dtype.startswith("bf16") else x.astype(np.float16).view(np.uint16)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (np.asarray(a, np.float64) * b + c).astype(np.float32)  # the product is exact; the sum is rounded twice


def _divide(a: Array, b: Array) -> Array:
    return a / b if np.asarray(a).dtype.kind == "f" else (a - np.fmod(a, b)) // b


def _shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(a.dtype)


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * np.asarray(a).dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _extract(a: Array, at: Array, count: Array) -> Array:
    """`count` bits from bit `at` on, the last of them the sign of a signed number."""
    wide = (a.astype(np.int64) >> np.minimum(at, 63).astype(np.int64)) & ((np.int64(1) << count.astype(np.int64)) - 1)
    if a.dtype.kind == "i":
        sign = np.int64(1) << np.maximum(count.astype(np.int64) - 1, 0)
        wide = (wide ^ sign) - sign
    return wide.astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of the eight of b:a, each chosen by four bits; the highest of these copies a byte's sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    out = np.zeros_like(both)
    for i in range(4):
        chosen = np.uint64(selector) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> ((chosen & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        byte = np.where(chosen & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint64)
        out |= byte << np.uint64(8 * i)
    return out.astype(np.uint32)


_FLOAT_ONLY = {"min": np.fmin, "max": np.fmax}  # of a number and NaN, the number
_BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum, "rem": np.fmod,
}  # fmt: skip
_UNARY = {
    "not": np.invert, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": np.reciprocal,
}  # fmt: skip
_FUNCTIONS = {"fma": _fma, "div": _divide, "prmt": _permute}


@maker(*_BINARY, *_UNARY)
def elementwise(launch: Any, ins: Instruction) -> Run:
    name, dtype = ins.opcode[0], TYPES[ins.opcode[-1]]
    ufunc = _FLOAT_ONLY.get(name) if dtype.kind == "f" and not ins.has("NaN") else None
    ufunc = ufunc or _BINARY.get(name) or _UNARY[name]
    out, *given = launch.operands(ins, dtype)
    if not ins.has("relu"):
        return lambda mask: ufunc(*given, out=out, where=mask)
    return lambda mask: np.copyto(out, np.maximum(ufunc(*given), 0), where=mask)


@maker(*_FUNCTIONS)
def function(launch: Any, ins: Instruction) -> Run:
    f = _FUNCTIONS[ins.opcode[0]]
    out, *given = launch.operands(ins, TYPES[ins.opcode[-1]])
    return lambda mask: np.copyto(out, f(*given), where=mask)


@maker("mul", "mad")
def multiply(launch: Any, ins: Instruction) -> Run:
    dtype = TYPES[ins.opcode[-1]]
    wide = ins.has("wide")
    result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if wide else dtype
    out = launch.write(ins.operands[0], result)
    a, b = (launch.read(x, dtype) for x in ins.operands[1:3])
    added = launch.read(ins.operands[3], result) if ins.opcode[0] == "mad" else None
    if ins.has("hi"):
        assert dtype.itemsize == 4 and added is None, ins.text
        return lambda mask: np.copyto(
            out, np.multiply(a, b, dtype=f"{dtype.kind}8") >> 32, where=mask, casting="unsafe"
        )
    if not wide and added is None:
        return lambda mask: np.multiply(a, b, out=out, where=mask)

    def run(mask: Any) -> None:
        product = np.multiply(a, b, dtype=result)
        np.copyto(out, product if added is None else product + added, where=mask)

    return run


@maker("shl", "shr")
def shift(launch: Any, ins: Instruction) -> Run:
    f, dtype = (_shift_left if ins.opcode[0] == "shl" else _shift_right), TYPES[ins.opcode[-1]]
    out, a = (launch.write(ins.operands[0], dtype), np.asarray(launch.read(ins.operands[1], dtype)))
    by = launch.read(ins.operands[2], TYPES["u32"])
    return lambda mask: np.copyto(out, f(a, by), where=mask)


@maker("shf")
def funnel_shift(launch: Any, ins: Instruction) -> Run:
    """32 bits of two registers, the second the higher: from bit `by` on, or the upper half shifted to the left."""
    left, most = ins.opcode[1] == "l", 31 if ins.has("wrap") else 32
    out, low, high, by = launch.operands(ins, TYPES["b32"])

    def run(mask: Any) -> None:
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | low
        count = np.asarray(by & most if most == 31 else np.minimum(by, most)).astype(np.uint64)
        found = both << count >> np.uint64(32) if left else both >> count
        np.copyto(out, found, where=mask, casting="unsafe")

    return run


@maker("bfe")
def bits(launch: Any, ins: Instruction) -> Run:
    dtype = TYPES[ins.opcode[-1]]
    out, a = launch.write(ins.operands[0], dtype), launch.read(ins.operands[1], dtype)
    at, count = (launch.read(x, TYPES["u32"]) for x in ins.operands[2:])
    return lambda mask: np.copyto(out, _extract(a, at, count), where=mask)


@maker("popc")
def count_bits(launch: Any, ins: Instruction) -> Run:
    out, a = launch.operands(ins, TYPES[ins.opcode[-1]])
    return lambda mask: np.copyto(out, np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1).sum(1), where=mask)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@maker("setp")
def compare(launch: Any, ins: Instruction) -> Run:
    dtype, how = TYPES[ins.opcode[-1]], ins.opcode[1]
    unordered = dtype.kind == "f" and how.endswith("u")
    test = _COMPARE[how.rstrip("u") if unordered else how]
    out = launch.write(ins.operands[0], TYPES["pred"])
    a, b = (launch.read(x, dtype) for x in ins.operands[1:3])
    combine = _COMBINE.get(ins.opcode[2])
    other = launch.read(ins.operands[3], TYPES["pred"]) if combine else None

    def run(mask: Any) -> None:
        found = test(a, b)
        if dtype.kind == "f" and (unordered or how == "ne"):  # comparisons with NaN: true if unordered, else false
            nan = np.isnan(a) | np.isnan(b)
            found = found | nan if unordered else found & ~nan
        np.copyto(out, combine(found, other) if combine else found, where=mask)

    return run


@maker("selp")
def select(launch: Any, ins: Instruction) -> Run:
    dtype = TYPES[ins.opcode[-1]]
    out, (a, b) = launch.write(ins.operands[0], dtype), (launch.read(x, dtype) for x in ins.operands[1:3])
    which = launch.read(ins.operands[3], TYPES["pred"])
    return lambda mask: np.copyto(out, np.where(which, a, b), where=mask)


@maker("cvt")
def convert(launch: Any, ins: Instruction) -> Run:
    to, of = ins.opcode[-2:]
    out = launch.write(ins.operands[0], launch.stored(ins.operands[0]) if TYPES[to].kind in "iu" else TYPES[to])
    given = [launch.read(x, TYPES[of]) for x in ins.operands[1:]]
    return lambda mask: np.copyto(out, _converted(ins, to, of, given), where=mask, casting="unsafe")


def _converted(ins: Instruction, to: str, of: str, given: list[Array]) -> Array:
    if to.endswith("x2"):
        high, low = (to_half(np.asarray(x), to).astype(np.uint32) for x in given)
        return high << np.uint32(16) | low
    x = from_half(given[0], of) if of in ("bf16", "f16") else given[0]
    if to == "bf16":
        return to_bf16(x)
    if TYPES[to].kind in "iu" and x.dtype.kind == "f":
        x = np.trunc(x) if ins.has("rzi") else np.floor(x) if ins.has("rmi") else np.rint(x)
    return x.astype(TYPES[to])
