"""The parts of a run in their order: what each does, how much of the time it may take, and the module that does it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from bench.gpu_check.setting import Setting


@dataclass(frozen=True)
class Part:
    """`module` has `units(setting) -> names` and `run(unit, setting, emit)`.

    `share` of the time left, against the parts behind it; `processes` work on its units side by side; a unit that
    takes longer than `unit_seconds` is stopped.
    """

    name: str
    module: str
    about: str
    share: float
    processes: int = 1
    unit_seconds: float = 120.0

    def load(self) -> ModuleType:
        return importlib.import_module(f"bench.gpu_check.{self.module}")

    def units(self, setting: Setting) -> Sequence[str]:
        names: Sequence[str] = self.load().units(setting)
        return names


PARTS = (
    Part("ceilings", "ceilings", "what the GPU can do: bytes copied and products made a second", 40),
    Part("build", "extension", "the CUDA kernels compiled, where nvcc is", 180, 1, 240),
    Part("numerics", "numerics", "every op against float64, poisoned outputs, the same bits every time", 150, 8),
    Part("graphs", "graphs", "torch.compile, CUDA graphs, streams, devices, memory", 60, 4),
    Part("micro", "micro", "attention against its peers, with targets", 170),
    Part("costs", "cost_table", "the cost table of decoding, by which the ops choose", 45),
    Part("end-to-end", "end_to_end", "the model against PEFT and the bare backbone", 160),
    Part("sanitizer", "sanitizer", "compute-sanitizer's memcheck and racecheck on small calls", 90, 2, 200),
)
BY_NAME = {part.name: part for part in PARTS}
