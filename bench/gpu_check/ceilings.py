"""What this GPU can do at best, measured on random data: bytes copied and operations of matrix products a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.attention_inputs import DTYPES
from bench.gpu_check import timing
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import Setting

_COPY = 2 << 30  # bytes read, and as many written
_SIDE = 8192  # of square matrices
_RUNS = 20


def units(setting: Setting) -> Sequence[str]:
    return ("memory", "bf16", "fp16", "fp32")


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One ceiling, the best of several runs, and once what the GPU is."""
    if unit == "memory":
        emit("gpu", **facts(setting.device))
    rate, how = _copy(setting) if unit == "memory" else _product(unit, setting)
    emit("ceiling", what=unit, rate=rate, how=how)


def facts(device: str) -> dict[str, Any]:
    """What a reader must know of the device."""
    if device == "cpu":
        return {"name": "cpu", "capability": None, "memory": 0, "multiprocessors": 0, "l2": 0, "count": 0}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2": found.L2_cache_size,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _copy(setting: Setting) -> tuple[float, str]:
    size = _room(1 << 20 if setting.quick else _COPY, setting)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    best = _best(lambda: target.copy_(source), setting)
    return 2 * size / best, f"copy of {size >> 20} MiB, bytes read and written"


def _product(dtype: str, setting: Setting) -> tuple[float, str]:
    side = 128 if setting.quick else _SIDE // 2 if dtype == "fp32" else _SIDE
    a, b = (torch.randn(side, side, device=setting.device).to(DTYPES[dtype]) for _ in range(2))
    best = _best(lambda: torch.mm(a, b), setting)
    return 2.0 * side**3 / best, f"torch.mm {side}x{side}x{side}, random data"


def _best(call: timing.Run, setting: Setting) -> float:
    for _ in range(3):
        call()
    return min(timing.seconds(call, setting.device) for _ in range(3 if setting.quick else _RUNS))


def _room(size: int, setting: Setting) -> int:
    """At most a quarter of the free memory."""
    return min(size, torch.cuda.mem_get_info()[0] // 4) if setting.on_gpu else size
