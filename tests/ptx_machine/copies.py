"""Instructions whose work happens later: asynchronous copies to shared memory, and barriers that wait for them.

A copy may happen as soon as it is issued or as late as somebody waits for it: `launch.copies` says which of the two.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import TYPES, Run, maker
from .memory import Array, PtxError
from .moves import address
from .program import Instruction


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0


@dataclass
class Pending:
    """Copies that were issued and did not happen yet, and the groups that lanes have closed."""

    groups: Array
    copies: list[tuple[Array, Array, Any]] = field(default_factory=list)  # lanes, their groups, what to do
    bulk: deque[Any] = field(default_factory=deque)


@maker("cp")
def copy(launch: Any, ins: Instruction) -> Run:
    if ins.has("commit_group"):
        return lambda mask: np.add(launch.pending.groups, 1, out=launch.pending.groups, where=mask)
    if ins.has("wait_group"):
        left = int(str(ins.operands[0]), 0)
        return lambda mask: wait(launch, launch.mask(mask), left)
    return _bulk(launch, ins) if ins.has("bulk") else _asynchronous(launch, ins)


def _asynchronous(launch: Any, ins: Instruction) -> Run:
    to, of = (address(launch, x) for x in ins.operands[:2])
    size = int(str(ins.operands[2]), 0)
    taken = launch.read(ins.operands[3], TYPES["u32"]) if len(ins.operands) > 3 else np.uint32(size)
    words = size // 4

    def run(mask: Any) -> None:
        lanes = launch.mask(mask).copy()
        into, source, count = to().copy(), of().copy(), np.broadcast_to(taken, launch.lanes).copy()

        def happen(which: Array) -> None:
            whole, none = which & (count == size), which & (count == 0)
            if not np.array_equal(which, whole | none):
                raise PtxError(f"only part of a copy is asked for: {ins.text}")
            values = launch.memory.load(source, np.dtype("u4"), words, whole)
            launch.shared.store(into, [np.where(none, np.uint32(0), v) for v in values], which)
            launch.count(launch.memory, source, size, whole)
            launch.count(launch.shared, into, size, which)

        if launch.early:
            happen(lanes)
        else:
            launch.pending.copies.append((lanes, launch.pending.groups.copy(), happen))

    return run


def wait(launch: Any, lanes: Array, left: int) -> None:
    """Lets all copies of these lanes happen but those of the last `left` groups."""
    kept = []
    for waiting, group, happen in launch.pending.copies:
        due = waiting & lanes & (group < launch.pending.groups - left)
        if due.any():
            happen(due)
        if (waiting & ~due).any():
            kept.append((waiting & ~due, group, happen))
    launch.pending.copies = kept


def _bulk(launch: Any, ins: Instruction) -> Run:
    to, of = (address(launch, x) for x in ins.operands[:2])
    size, barrier = launch.read(ins.operands[2], TYPES["u32"]), address(launch, ins.operands[3])

    def run(mask: Any) -> None:
        into, source, sizes, at = to(), of(), np.broadcast_to(size, launch.lanes), barrier()
        for lane in np.flatnonzero(launch.mask(mask)):
            count = int(sizes[lane])
            if count % 16 or int(into[lane]) % 16 or int(source[lane]) % 16:
                raise PtxError(f"a bulk copy that is no multiple of 16 bytes: {ins.text}")
            one = (int(launch.block[lane]), int(into[lane]), int(source[lane]), count, int(at[lane]))
            _happen(launch, *one) if launch.early else launch.pending.bulk.append(one)

    return run


def _happen(launch: Any, block: int, to: int, of: int, size: int, barrier: int) -> None:
    steps = np.arange(0, size, 16)
    everywhere, blocks = np.ones(len(steps), bool), np.full(len(steps), block)
    words = launch.memory.load(np.uint64(of) + steps.astype(np.uint64), np.dtype("u4"), 4, everywhere)
    launch.shared.store_in(blocks, to + steps, words, everywhere)
    launch.count(launch.memory, of + steps, 16, everywhere)
    _change(launch, block, barrier, size=-size)


def bulk_happens(launch: Any) -> bool:
    """Lets the oldest bulk copy happen, if there is one."""
    if launch.pending.bulk:
        _happen(launch, *launch.pending.bulk.popleft())
        return True
    return False


def _change(launch: Any, block: int, at: int, size: int, arrivals: int = 0) -> None:
    """A barrier's phase ends when neither arrivals nor bytes are missing; then who waits may look again."""
    found = _barrier(launch, block, at)
    found.bytes += size
    found.pending -= arrivals
    if not found.pending and not found.bytes:
        found.pending, found.phase = found.expected, found.phase + 1
        launch.waits[:] = False


def _barrier(launch: Any, block: int, at: int) -> Barrier:
    if (block, at) not in launch.barriers:
        raise PtxError(f"no mbarrier at {at:#x} of block {block}")
    return launch.barriers[block, at]


@maker("mbarrier")
def barrier(launch: Any, ins: Instruction) -> Run:
    return {"init": _init, "arrive": _arrive, "try_wait": _try_wait}[ins.opcode[1]](launch, ins)


def _each(launch: Any, mask: Any, at: Any, value: Any) -> Any:
    values, addresses = np.broadcast_to(value, launch.lanes), at()
    for lane in np.flatnonzero(launch.mask(mask)):
        yield lane, int(launch.block[lane]), int(addresses[lane]), int(values[lane])


def _init(launch: Any, ins: Instruction) -> Run:
    at, arrivals = address(launch, ins.operands[0]), launch.read(ins.operands[1], TYPES["u32"])

    def run(mask: Any) -> None:
        for _, block, where, count in _each(launch, mask, at, arrivals):
            launch.barriers[block, where] = Barrier(count, count)

    return run


def _arrive(launch: Any, ins: Instruction) -> Run:
    assert ins.has("expect_tx") and ins.operands[0] == "_", ins.text
    at, size = address(launch, ins.operands[1]), launch.read(ins.operands[2], TYPES["u32"])

    def run(mask: Any) -> None:
        for _, block, where, count in _each(launch, mask, at, size):
            _change(launch, block, where, size=count, arrivals=1)

    return run


def _try_wait(launch: Any, ins: Instruction) -> Run:
    """Lanes whose phase is not over wait, where a real machine would also answer no after a while."""
    assert ins.has("parity"), ins.text
    out = launch.write(ins.operands[0], TYPES["pred"])
    at, parity = address(launch, ins.operands[1]), launch.read(ins.operands[2], TYPES["u32"])

    def run(mask: Any) -> None:
        waiting = np.zeros(launch.lanes, bool)
        for lane, block, where, which in _each(launch, mask, at, parity):
            waiting[lane] = _barrier(launch, block, where).phase % 2 == which
        np.copyto(out, True, where=launch.mask(mask) & ~waiting)
        launch.waits |= waiting

    return run
