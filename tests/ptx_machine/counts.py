"""What a launch asks of memory and of a chip's schedulers, counted: how well it is laid out, whatever a clock says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .memory import Array

_WARP, _SECTOR, _BANKS = 32, 32, 32


@dataclass
class Counts:
    """Of one launch or several.

    `instructions`: those of warps, by opcode. `loaded`: bytes that lanes load from global memory; `moved`: of the
    sectors of 32 bytes that they lie in, a warp's sectors counted once for each instruction. `rounds`: of the banks of
    shared memory, and `least`: how many there would be without conflicts.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    loaded: int = 0
    moved: int = 0
    rounds: int = 0
    least: int = 0

    def instruction(self, opcode: str, mask: Array) -> None:
        self.instructions[opcode] += int(mask.reshape(-1, _WARP).any(1).sum())

    def load(self, address: Array, size: int, mask: Array) -> None:
        """A load of `size` aligned bytes, at most 32, by each lane of the mask."""
        lanes = np.flatnonzero(mask)
        sectors = np.stack([lanes // _WARP, address[lanes].astype(np.int64) // _SECTOR], 1)
        self.loaded += size * lanes.size
        self.moved += _SECTOR * len(np.unique(sectors, axis=0))

    def banks(self, address: Array, size: int, mask: Array) -> None:
        """An access to shared memory: 128 bytes of lanes at a time, each bank one word of 4 bytes a round."""
        lanes = np.flatnonzero(mask)
        if not lanes.size:
            return
        words = max(size // 4, 1)
        word = address[lanes].astype(np.int64)[:, None] // 4 + np.arange(words)
        phase = np.broadcast_to((lanes // (_WARP // words))[:, None], word.shape)
        wanted = np.unique(np.stack([phase.reshape(-1), word.reshape(-1)], 1), axis=0)
        each = np.unique(np.stack([wanted[:, 0], wanted[:, 1] % _BANKS], 1), axis=0, return_counts=True)
        phases, first = np.unique(each[0][:, 0], return_index=True)
        self.rounds += int(np.maximum.reduceat(each[1], first).sum())
        self.least += phases.size
