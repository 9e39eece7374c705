"""compute-sanitizer's memcheck and racecheck over a few small calls of every op, forward and backward."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.checkout import ROOT
from bench.gpu_check.calls import Right
from bench.gpu_check.grid import GRID
from bench.gpu_check.records import Emit, NotAvailable
from bench.gpu_check.setting import Setting
from bench.measure import CheckFailed
from fastprompt.errors import FastPromptError

_TOOLS = ("memcheck", "racecheck")
_CALLS = (
    "prefix_attention softcap, sinks, biases", "prefix_attention odd head sizes", "prefix_attention static cache",
    "paged_prefix_attention ragged", "paged_prefix_attention shared prefixes",
    "paged_prefix_attention decode, shared prefixes", "paged_prefix_attention decode, cut into parts",
    "paged_prefix_attention decode, large heads, softcap, sinks", "embed_prompts left", "merge_states",
    "grouped_linear odd size",
)  # fmt: skip
_FOUND = 86  # exit status of the tool where it found something
_SECONDS = 180
_TAIL = 1200  # characters of what it said
_CHILD = "one process"  # the unit that the tool watches


def units(setting: Setting) -> Sequence[str]:
    return _TOOLS


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """A tool over a process of its own; `CheckFailed` with what it says where it finds anything."""
    if unit == _CHILD:
        return _calls(setting)
    found = tool()
    if not setting.on_gpu or found is None:
        raise NotAvailable("compute-sanitizer is not installed")
    request = {"part": "sanitizer", "units": [_CHILD], "setting": setting.request(), "seconds": _SECONDS}
    command = [found, "--tool", unit, "--error-exitcode", str(_FOUND), sys.executable, "-m", "bench.gpu_check.worker"]
    # each tensor is an allocation of its own, so that memcheck sees its borders
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, input=json.dumps(request), capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"it took more than {_SECONDS} s") from None
    judge(unit, done.returncode, done.stdout + done.stderr)
    emit("note", text=summary(done.stdout + done.stderr))


def judge(unit: str, status: int, text: str) -> None:
    """Nothing where the calls were watched and nothing was found."""
    if status == _FOUND:
        raise CheckFailed(f"{unit}: {_said(text)[-_TAIL:]}")
    if "Device not supported" in text or "not supported on this" in text:
        raise NotAvailable(f"{unit} does not run on this machine: {summary(text)}")
    if status != 0 or '"state": "green"' not in text:
        raise RuntimeError(f"{unit} ended with status {status}: {text[-_TAIL:]}")


def summary(text: str) -> str:
    """The tool's last word."""
    lines = [line for line in text.splitlines() if "SUMMARY" in line] or _said(text).splitlines()[-1:]
    return " ".join(lines).replace("=", "").strip()


def _said(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if re.match(r"=====", line))


def tool() -> str | None:
    """compute-sanitizer, on the path or beside CUDA."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def _calls(setting: Setting) -> None:
    """What is watched; numbers are looked at on the host, where no kernel has to be watched for it."""
    for name in _CALLS:
        call = GRID[name](torch.float16)
        right, there = Right.of(call), call.to(setting.device)
        for place, impl in enumerate(setting.impls(call.op, call.dtype)):
            if impl == "flash":  # another project's
                continue
            try:
                found = there.ours(impl)
            except FastPromptError:
                if place == 0:
                    raise
                continue  # not a call that this one takes
            right.errors({n: x.cpu() for n, x in found.items()})
