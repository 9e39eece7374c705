"""The native extensions compiled for this machine's GPU where nvcc is, so that a bare checkout checks CUDA too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from bench import checkout
from bench.gpu_check.records import Emit, NotAvailable
from bench.gpu_check.setting import Setting
from fastprompt import dispatch

_SECONDS = 230
_TAIL = 1200  # characters of what a failed build said
_MISSING = ("there is no CUDA compiler", "is not installed")  # what setup.py says where it needs something


def units(setting: Setting) -> Sequence[str]:
    return ("the native extensions",)


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """Builds them into `checkout.BUILT`, unless CUDA kernels run here already."""
    if not setting.on_gpu:
        raise NotAvailable("there is no GPU to build for")
    if dispatch.obstacle("paged_prefix_attention", "cuda") is None:
        return emit("note", text="CUDA kernels are installed already")
    env = os.environ | {"FASTPROMPT_BUILD": "cuda", "FASTPROMPT_CUDA_ARCHS": arch(torch.cuda.get_device_capability())}
    both_at_once = ("--parallel", str(os.cpu_count() or 1))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *both_at_once, "--build-lib", str(checkout.BUILT)]
    try:
        done = subprocess.run(command, cwd=checkout.ROOT, env=env, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotAvailable(f"it took more than {_SECONDS} s") from None
    said = done.stdout + done.stderr
    if done.returncode and (any(text in said for text in _MISSING) or "No module named 'setuptools'" in said):
        raise NotAvailable(said.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(said[-_TAIL:])
    emit("note", text=f"built for sm_{env['FASTPROMPT_CUDA_ARCHS']}")


def arch(capability: tuple[int, int]) -> str:
    """As FASTPROMPT_CUDA_ARCHS has it."""
    number = f"{capability[0]}{capability[1]}"
    return "90a" if number == "90" else number
