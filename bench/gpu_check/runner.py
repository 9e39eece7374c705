"""Units of a part in processes of their own: what a process cannot end, another one goes on with."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any

from bench.checkout import ROOT
from bench.gpu_check import records
from bench.gpu_check.parts import Part
from bench.gpu_check.setting import Setting
from bench.measure import SCHEMA

Line = dict[str, Any]
_WORKER = (sys.executable, "-m", "bench.gpu_check.worker")
_GRACE = 15.0  # seconds a process has beyond its limit, for the unit that it is in
_PATIENCE = 10.0  # seconds between a worker's last line and its end
_START = 90.0  # seconds to import everything
_TICK = 1.0  # seconds between looks whether it was interrupted
_ROOM = 10 << 30  # bytes of the GPU that a process may take where several work side by side
_TAIL = 600  # characters of what a process printed that explain its end


def drive(
    part: Part,
    units: Sequence[str],
    setting: Setting,
    seconds: float,
    tell: Callable[[Line], None],
    memory: float | None = None,
) -> None:
    """Does all units within about so many seconds; every unit gets a `unit` line, whatever happens.

    Processes side by side are no more than the cores, nor than what `memory` bytes of the GPU have room for.
    """
    room = part.processes if memory is None else int(memory / _ROOM)
    if not units:
        return
    count = max(1, min(part.processes, len(units), os.cpu_count() or 1, room))
    lock = threading.Lock()

    def told(line: Line) -> None:
        with lock:
            tell(line)

    end = time.monotonic() + seconds
    stopped = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        try:
            for done in [
                pool.submit(_finish, part, units[i::count], setting, end, told, stopped) for i in range(count)
            ]:
                done.result()
        except BaseException:  # an interrupt: the pool waits for its threads, and they for their processes
            stopped.set()
            raise


def _finish(
    part: Part,
    units: Sequence[str],
    setting: Setting,
    end: float,
    tell: Callable[[Line], None],
    stopped: threading.Event,
) -> None:
    """One process after the other until no unit is left."""
    left = list(units)
    while left and not stopped.is_set():
        seconds = end - time.monotonic()
        if seconds <= 0:
            for unit in left:
                tell(_unit(part, unit, records.NOT_RUN, "the time of its part was used up"))
            return
        left = _Process(part, left, setting, seconds, stopped).follow(tell)


class _Process:
    """A worker, and which of its units it has begun and ended."""

    def __init__(
        self, part: Part, units: Sequence[str], setting: Setting, seconds: float, stopped: threading.Event
    ) -> None:
        self._stopped = stopped
        self._part, self._left, self._open = part, list(units), ""
        self._limit = time.monotonic() + seconds + _GRACE
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            _WORKER,
            cwd=ROOT, env=environment(part), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()
        request = {"part": part.name, "units": self._left, "setting": setting.request(), "seconds": seconds}
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead already, which following it tells
            self._process.stdin.write(json.dumps(request))
            self._process.stdin.close()

    def follow(self, tell: Callable[[Line], None]) -> list[str]:
        """Passes its lines on until it ends or a unit takes too long; what it has not done."""
        state, why = records.ERROR, ""
        try:
            while (text := self._next()) is not None:
                self._take(text, tell)
        except TimeoutError as error:
            why = str(error)
            state = records.NOT_RUN if self._over() else records.ERROR
        finally:
            _end(self._process, _PATIENCE if not why else 0.0)
        if self._left and (why or self._process.returncode != records.LOST):  # what ended it would end the next one too
            unit = self._open or self._left[0]
            self._left.remove(unit)
            why = why or f"the process ended with status {self._process.returncode}: {self._tail()}"
            tell(_unit(self._part, unit, state, why))
        return self._left

    def _over(self) -> bool:
        return time.monotonic() >= self._limit

    def _next(self) -> str | None:
        """The next line, None at the end; `TimeoutError` after the time of a unit, of the part, or an interrupt."""
        allowed = self._part.unit_seconds if self._open else max(_START, self._part.unit_seconds)
        end = min(self._limit, time.monotonic() + allowed)
        while time.monotonic() < end and not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._lines.get(timeout=min(_TICK, max(0.01, end - time.monotonic())))
        limit = "the time of its part was used up" if self._over() else f"no word from it for {allowed:.0f} s"
        raise TimeoutError(f"stopped: {limit}")

    def _take(self, text: str, tell: Callable[[Line], None]) -> None:
        try:
            line = records.parse(text)
        except ValueError as error:
            line = {"schema": SCHEMA, "kind": "note", "part": self._part.name, "unit": self._open}
            line["text"] = f"not a line of a worker ({error}): {text.strip()[:_TAIL]}"
        if line["kind"] == "begin":
            self._open = line["unit"]
            return
        if line["kind"] == "unit":
            self._open = ""
            self._left.remove(line["unit"])
        tell(line)

    def _tail(self) -> str:
        self._printed.seek(0)
        return self._printed.read()[-_TAIL:].strip()


def environment(part: Part) -> Mapping[str, str]:
    """Of a worker; repeated products must not depend on which workspace they got."""
    changed = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if part.processes > 1:  # they share the cores
        changed |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    if part.name in ("numerics", "graphs"):
        changed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return os.environ | changed


def _unit(part: Part, unit: str, state: str, detail: str) -> Line:
    return {
        "schema": SCHEMA, "kind": "unit", "part": part.name, "unit": unit, "state": state, "seconds": 0.0,
        "detail": detail,
    }  # fmt: skip


def _pump(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for text in stream:
        lines.put(text)
    lines.put(None)


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """Waits for a worker to end by itself, which leaves it its status; ends one that does not, with all it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
