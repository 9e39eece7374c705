"""A process that does some units of one part: JSON lines on its output, everything that libraries print elsewhere.

Its request is one JSON object on the input: part, units, setting, and seconds after which it starts no further unit.
After an error the device may be lost to the process; then it ends with `LOST`, and another one does what is left.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from bench import checkout
from bench.gpu_check import records
from bench.gpu_check.parts import BY_NAME, Part
from bench.gpu_check.records import LOST, Emit, NotAvailable
from bench.gpu_check.setting import Setting
from bench.measure import CheckFailed, Journal

_DETAIL = 1500  # characters of an error that are kept


def main() -> int:
    """Does what the request on the input asks for."""
    faulthandler.enable()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else is printed here is no line of ours
    request = json.loads(sys.stdin.read())
    checkout.find_kernels()
    checkout.find_extensions()
    part = BY_NAME[request["part"]]
    return work(part, request["units"], Setting(**request["setting"]), request["seconds"], lines)


def work(part: Part, units: Sequence[str], setting: Setting, seconds: float, lines: TextIO) -> int:
    """Does the units one after the other, each of them guarded; the exit status."""
    journal, end = Journal(lines), time.monotonic() + seconds
    run = part.load().run
    for unit in units:
        if time.monotonic() >= end:
            journal.write(
                "unit", part=part.name, unit=unit, state=records.NOT_RUN, seconds=0.0, detail="its time was used up"
            )
            continue
        journal.write("begin", part=part.name, unit=unit)
        started = time.monotonic()
        state, detail = _guarded(run, unit, setting, _emitter(journal, part.name, unit))
        taken = round(time.monotonic() - started, 3)
        journal.write("unit", part=part.name, unit=unit, state=state, seconds=taken, detail=detail)
        if state == records.ERROR and _device_is_lost(setting):
            return LOST
    return 0


def _emitter(journal: Journal, part: str, unit: str) -> Emit:
    return lambda kind, **values: journal.write(kind, **{"part": part, "unit": unit} | values)


def _guarded(run: Callable[..., None], unit: str, setting: Setting, emit: Emit) -> tuple[str, str]:
    try:
        run(unit, setting, emit)
        if setting.on_gpu:
            torch.cuda.synchronize()  # errors of kernels come late
    except CheckFailed as error:
        return records.RED, str(error)[:_DETAIL]
    except NotAvailable as error:
        return records.NOT_AVAILABLE, str(error)[:_DETAIL]
    except Exception as error:
        traceback.print_exc()
        return records.ERROR, described(error)
    return records.GREEN, ""


def described(error: BaseException) -> str:
    """An error in a line, with where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:_DETAIL] + place


def _device_is_lost(setting: Setting) -> bool:
    if not setting.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=setting.device).item()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
