"""Who runs next: branches, and waiting for the rest of a warp, for the block, for copies.

Of the threads that can go on, those furthest behind run, together, up to the next branch or wait. So threads that went
apart meet again, and any order of the instructions of different warps that happens here may happen on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from . import arithmetic, copies, moves, warps, wgmma
from .memory import Array, PtxError
from .program import Instruction

assert all((arithmetic, moves, copies, warps, wgmma))  # they fill MAKERS
_NOTHING = {"fence", "membar", "griddepcontrol", "nanosleep"}  # the machine keeps these orders anyway
_RUNS, _EXITED, _AT_WARP, _AT_COPIES, _AT_BARRIER = range(5)  # states of a lane; + the number of a barrier
Step = Callable[[Any], bool]  # runs an instruction for a mask; whether the lanes go on with the next


class Flow:
    """Where each lane is, and whether it waits."""

    def __init__(self, launch: Any, seed: int | None) -> None:
        self._launch, self._code = launch, launch.kernel.code
        self._at = np.zeros(launch.lanes, np.int64)
        self._state = np.full(launch.lanes, _RUNS, np.uint8)
        self._random, self._warp = None if seed is None else Random(seed), -1
        self._whole = True  # whether those that run are whole warps
        self._steps = [self._step(i, ins) for i, ins in enumerate(self._code)]
        self._met = set(launch.kernel.labels.values())  # where threads that went apart may meet

    def run(self) -> None:
        while not (self._state == _EXITED).all():
            runs = self._state == _RUNS
            if runs.any():
                self._advance(self._chosen(runs))
            elif not self._release() and not copies.bulk_happens(self._launch):
                raise PtxError(f"all threads wait: {self._where()}")
            self._state[(self._state == _AT_COPIES) & ~self._launch.waits] = _RUNS

    def _chosen(self, runs: Array) -> Array:
        """Of those that run, the ones furthest behind: of all, or of one warp."""
        if self._random is not None:
            running = runs.reshape(-1, warps.WARP).any(1)
            if self._warp < 0 or not running[self._warp]:
                self._warp = self._random.choice(np.flatnonzero(running).tolist())
            runs = runs & (np.arange(runs.size) // warps.WARP == self._warp)
        return runs & (self._at == self._at[runs].min())

    def _advance(self, lanes: Array) -> None:
        """Runs these lanes, which are at one instruction, up to the next branch, wait or meeting."""
        at = int(self._at[np.argmax(lanes)])
        mask: Any = True if lanes.all() else lanes
        by_warp = lanes.reshape(-1, warps.WARP)
        self._whole = mask is True or np.array_equal(by_warp.any(1), by_warp.all(1))
        while True:
            if self._launch.counts is not None:
                self._launch.counts.instruction(self._code[at].opcode[0], lanes)
            try:
                going = self._steps[at](mask)
            except PtxError as error:
                name, text = self._launch.kernel.name, self._code[at].text
                raise PtxError(f"{name}, instruction {at}, {text}: {error}") from None
            at += 1
            if going and at in self._met:
                self._at[lanes] = at
            if not going or at in self._met:
                return

    def _step(self, i: int, ins: Instruction) -> Step:
        name = ins.opcode[0]
        guard = None if ins.guard is None else self._launch.read(ins.guard[0], arithmetic.TYPES["pred"])
        negated = ins.guard is not None and ins.guard[1]

        def chosen(mask: Any) -> Any:
            return mask if guard is None else self._launch.mask(mask) & (~guard if negated else guard)

        if name in ("bra", "ret", "exit"):
            return self._leave(i, ins, chosen)
        if name in warps.WARP_WIDE or ins.opcode[:2] == ("bar", "warp"):
            return self._together(i, ins)
        if name in ("bar", "barrier"):
            return self._arrive(i, ins)
        if name in _NOTHING:
            return lambda mask: True
        run = self._made(ins)
        if ins.opcode[:2] == ("mbarrier", "try_wait"):
            return self._try(i, run, chosen)

        def step(mask: Any) -> bool:
            run(chosen(mask))
            return True

        return step

    def _made(self, ins: Instruction) -> arithmetic.Run:
        if ins.opcode[0] not in arithmetic.MAKERS:
            raise PtxError(f"{ins.text}: this instruction is not known")
        return arithmetic.MAKERS[ins.opcode[0]](self._launch, ins)

    def _leave(self, i: int, ins: Instruction, chosen: Any) -> Step:
        target = self._launch.kernel.labels[str(ins.operands[0])] if ins.opcode[0] == "bra" else None

        def step(mask: Any) -> bool:
            self._at[self._launch.mask(mask)] = i + 1
            gone = self._launch.mask(chosen(mask))
            if target is None:
                copies.wait(self._launch, gone, 0)
                self._state[gone] = _EXITED
            else:
                self._at[gone] = target
            return False

        return step

    def _arrive(self, i: int, ins: Instruction) -> Step:
        if ins.guard is not None or len(ins.operands) != 1:
            raise PtxError(f"{ins.text}: barriers of a part of the block are not known")
        number = int(str(ins.operands[0]), 0)

        def step(mask: Any) -> bool:
            lanes = self._launch.mask(mask)
            self._at[lanes], self._state[lanes] = i + 1, _AT_BARRIER + number
            return False

        return step

    def _try(self, i: int, run: arithmetic.Run, chosen: Any) -> Step:
        """Lanes that must wait look again when something has changed."""

        def step(mask: Any) -> bool:
            run(chosen(mask))
            lanes = self._launch.mask(mask)
            waits = self._launch.waits[lanes]
            self._at[lanes], self._state[lanes] = np.where(waits, i, i + 1), np.where(waits, _AT_COPIES, _RUNS)
            return False

        return step

    def _together(self, i: int, ins: Instruction) -> Step:
        """Instructions of whole warps wait until all lanes are there."""
        if ins.guard is not None:
            raise PtxError(f"{ins.text}: only some lanes of a warp take part")
        run = self._made(ins) if ins.opcode[0] != "bar" else lambda mask: None
        size = wgmma.GROUP if ins.opcode[0] == "wgmma" else warps.WARP

        def step(mask: Any) -> bool:
            if mask is True or (self._whole and size == warps.WARP):
                run(mask)
                return True
            there = mask | (self._state == _AT_WARP) & (self._at == i)
            whole = np.repeat(there.reshape(-1, size).all(1), size)
            if whole.any():
                run(whole)
            if np.array_equal(whole, mask):
                return True
            self._at[there], self._state[there] = i, _AT_WARP
            self._at[whole], self._state[whole] = i + 1, _RUNS
            return False

        return step

    def _release(self) -> bool:
        """Lets blocks go on whose threads have all come to one barrier."""
        states = self._state.reshape(-1, self._launch.threads)
        first = states.max(1)
        over = (first >= _AT_BARRIER) & ((states == first[:, None]) | (states == _EXITED)).all(1)
        states[over] = np.where(states[over] == _EXITED, _EXITED, _RUNS)
        return bool(over.any())

    def _where(self) -> str:
        waiting = sorted(set(self._at[self._state != _EXITED].tolist()))[:4]
        return "; ".join(f"behind {self._code[at - 1].text}, at {self._code[at].text}" for at in waiting)
