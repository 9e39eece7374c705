"""What tests of gpu-check share: settings without and with a GPU, samples, and one unit run here."""

from __future__ import annotations

from types import ModuleType

from bench.gpu_check import records
from bench.gpu_check.setting import Setting
from bench.measure import SCHEMA, Sample

DRY = Setting("cpu", "reference", True)
FULL = Setting("cuda", None, False, {"memory": 4e12, "bf16": 8e14})


def samples(*seconds: float) -> list[Sample]:
    return [Sample(i, s, s, 0.0) for i, s in enumerate(seconds)]


def run_unit(module: ModuleType, name: str, setting: Setting = DRY) -> list[dict]:
    lines: list[dict] = []

    def emit(kind: str, **values) -> None:
        lines.append({"schema": SCHEMA, "kind": kind, "part": "x", "unit": name, **values})
        assert records.problem(lines[-1]) is None

    module.run(name, setting, emit)
    return lines
