"""What a process and what torch takes of memory, in bytes. Linux only."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop else
_C = ctypes.CDLL(None)


def status(*names: str, pid: int | str = "self") -> dict[str, int]:
    """Bytes by their names in `/proc/PID/status`: `VmRSS` and `VmHWM`, now and at most; `RssAnon`, `RssFile`."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    held = {words[0].rstrip(":"): words[1] for words in lines if len(words) > 1}
    return {name: int(held[name]) << 10 for name in names}


def resident() -> int:
    """Bytes of this process in memory, without what Python could free."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_growth(call: Callable[[], Any]) -> int:
    """By how many bytes the process grew at most while `call` ran."""
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)  # memory that was kept to be used again would hide a copy
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    result = call()
    peak = status("VmHWM")["VmHWM"]
    del result
    return max(0, peak - before)


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that torch allocated in all while `call` ran, those it gave back too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    return sum(max(0, e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]")
