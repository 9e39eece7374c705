"""A launch: its threads' registers and memory, and what instructions' makers ask of it."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from . import arithmetic, copies
from .arithmetic import TYPES
from .counts import Counts
from .flow import Flow
from .memory import READ, SHARED_BASE, Array, Memory, PtxError, Shared, Space
from .program import Instruction, Kernel
from .warps import WARP


class Copies(Enum):
    """When asynchronous copies happen: as they are issued, or as they are waited for."""

    EARLY = "early"
    LATE = "late"


def launch(
    kernel: Kernel,
    memory: Memory,
    params: bytes,
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
    *,
    when: Copies = Copies.EARLY,
    seed: int | None = None,
    counts: Counts | None = None,
) -> None:
    """Runs a kernel to its end.

    With a seed, one warp at a time runs until it must wait, in a random order; without, all run together.
    `counts` adds up what the launch asks of memory. Raises PtxError where a real machine would fault, hang, or do what
    is not defined.
    """
    if len(params) != kernel.param_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.param_bytes} bytes of parameters, {len(params)} came")
    if threads % WARP:
        raise PtxError(f"{threads} threads are no whole warps")
    with np.errstate(all="ignore"):
        state = Launch(kernel, memory, params, blocks, threads, shared_bytes, when, counts)
        Flow(state, seed).run()


class Launch:
    """Registers and memory of all threads, which are the lanes of arrays."""

    generic = 0x6000_0000_0000  # where shared memory lies among all addresses

    def __init__(
        self, kernel: Kernel, memory: Memory, params: bytes, blocks: int, threads: int, shared_bytes: int,
        when: Copies, counts: Counts | None,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.early = kernel, memory, when is Copies.EARLY
        self.lanes, self.threads = blocks * threads, threads
        self.block = np.repeat(np.arange(blocks), threads)
        self.shared = Shared(blocks, kernel.static_shared + shared_bytes, self.block)
        self.param = Space(0, len(params))
        self.param.open(0, len(params), READ)[:] = np.frombuffer(params, np.uint8)
        self.barriers: dict[tuple[int, int], copies.Barrier] = {}
        self.pending = copies.Pending(np.zeros(self.lanes, np.int64))
        self.counts = counts
        self.waits = np.zeros(self.lanes, bool)  # for an mbarrier
        self._all = np.ones(self.lanes, bool)
        self._registers = _registers(kernel, self.lanes)
        self._special = _special(blocks, threads)

    def read(self, operand: Any, dtype: Any) -> Any:
        """A register's numbers, seen as `dtype`, its low bits if it is wider; or what a literal or a symbol says."""
        held = self._registers.get(operand, self._special.get(operand))
        if held is not None:
            return held.view(dtype)[:: held.dtype.itemsize // dtype.itemsize]
        if operand in self.kernel.params:
            return dtype.type(self.kernel.params[operand])
        if operand in self.kernel.shared:
            return dtype.type(self.kernel.shared[operand] + SHARED_BASE)
        return arithmetic.number(operand, dtype)

    def write(self, operand: Any, dtype: Any) -> Array:
        """A register, seen as `dtype`."""
        return np.empty(self.lanes, dtype) if operand == "_" else self._registers[operand].view(dtype)

    def stored(self, operand: str) -> Any:
        """The type of a register as it is kept, of a symbol as of an address."""
        return self._registers[operand].dtype if operand in self._registers else TYPES["u64"]

    def operands(self, ins: Instruction, dtype: Any) -> list[Any]:
        """The first operand to write and the others to read, all of one type."""
        return [self.write(ins.operands[0], dtype), *(self.read(x, dtype) for x in ins.operands[1:])]

    def count(self, space: Space, address: Array, size: int, mask: Array) -> None:
        """An access to memory: shared memory's either way, global memory's loads."""
        if self.counts is not None and space is not self.param:
            (self.counts.banks if space is self.shared else self.counts.load)(address, size, mask)

    def mask(self, mask: Any) -> Array:
        """A mask as an array, where True stands for all lanes."""
        return self._all if mask is True else mask


def _registers(kernel: Kernel, lanes: int) -> dict[str, Array]:
    """All bits set: NaN as floats; predicates are false."""
    found: dict[str, Array] = {}
    for kind in sorted(set(kernel.registers.values())):
        names = [name for name, k in kernel.registers.items() if k == kind]
        dtype = TYPES["pred" if kind == "pred" else "b" + kind[1:]]
        room = np.full((len(names), lanes * dtype.itemsize), 0 if kind == "pred" else 0xFF, np.uint8)
        found |= dict(zip(names, room.view(dtype), strict=True))
    return found


def _special(blocks: int, threads: int) -> dict[str, Array]:
    """Registers that say which thread it is; blocks and grids have one dimension."""
    lane = np.arange(blocks * threads)
    x = {"tid": lane % threads, "ctaid": lane // threads, "ntid": lane * 0 + threads, "nctaid": lane * 0 + blocks}
    found = {f"%{name}.x": value for name, value in x.items()}
    found |= {f"%{name}.{axis}": lane * 0 + (name[0] == "n") for name in x for axis in "yz"}
    found |= {"%laneid": lane % WARP, "%warpid": lane % threads // WARP}
    return {name: value.astype(np.uint32) for name, value in found.items()}
