"""The whole model against PEFT and the bare backbone; what stands on transformers is imported where it runs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu_check.records import Emit
from bench.gpu_check.setting import Setting

TOGETHER = (16, 32, 128)  # tokens a row


def units(setting: Setting) -> Sequence[str]:
    return ("forward", "forward, mixed", "train", *(f"together {n}" for n in TOGETHER), "generate", "decode in graphs")


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One comparison; `CheckFailed` where ours is wrong. PEFT's errors are PEFT's."""
    from bench.gpu_check import decode_graphs, model_runs

    if unit == "decode in graphs":
        return decode_graphs.run(setting, emit)
    model_runs.run(unit, setting, emit)
