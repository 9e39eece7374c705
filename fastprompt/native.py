"""The native extensions: why one cannot run here, and loading it.

`fastprompt._native` runs on the CPU, with torch's threads; `fastprompt._native_cuda` on NVIDIA GPUs.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastprompt import env
from fastprompt.errors import ArgumentError, ImplementationError

_NOT_BUILT = {
    "_native": "install fastprompt from source where a C++17 compiler works (FASTPROMPT_BUILD=cpu says what is "
    "missing), or set FASTPROMPT_IMPL=reference",
    "_native_cuda": "install fastprompt with FASTPROMPT_BUILD=cuda where there is nvcc",
}
_CUDA = 2  # DLPack's number of the device


@cache
def obstacle() -> str | None:
    """Why the extension cannot run here, or None."""
    try:
        load()
    except ImplementationError as error:
        return str(error)
    return None


@cache
def load() -> Any:
    """The extension, running on torch's threads and with the instruction set of FASTPROMPT_CPU_ISA.

    Raises `ImplementationError` where it cannot run and `ArgumentError` for an instruction set that it cannot use.
    """
    native = _import("_native")
    library = ctypes.CDLL(torch._C.__file__)  # finds what torch's own libraries export
    try:
        pool = library.torch_parallel_for, library.torch_get_num_threads
        tensors = torch.Tensor.__dlpack_c_exchange_api__
        native.connect(tensors, *(ctypes.cast(function, ctypes.c_void_p).value for function in pool))
    except (AttributeError, RuntimeError) as error:
        raise ImplementationError(f"torch {torch.__version__} does not fit fastprompt._native: {error}") from None
    isa = env.cpu_isa()
    if isa is not None:
        if isa not in native.isas():
            raise ArgumentError(f"FASTPROMPT_CPU_ISA is {isa!r}, expected one of {', '.join(native.isas())}, or unset")
        native.use_isa(isa)
    return native


@cache
def cuda_obstacle() -> str | None:
    """Why the CUDA extension cannot run on this machine's GPU, or None."""
    try:
        built = load_cuda()
    except ImplementationError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "fastprompt._native_cuda is here, but a GPU and its driver are not installed"
    return not_built_for(torch.cuda.get_device_capability(), built.archs())


@cache
def load_cuda() -> Any:
    """The CUDA extension, which needs no GPU to be loaded.

    Raises `ImplementationError` where there is none, or where it does not fit torch.
    """
    extension = _import("_native_cuda")
    try:
        extension.connect(torch.Tensor.__dlpack_c_exchange_api__, _CUDA)
    except (AttributeError, RuntimeError) as error:
        raise ImplementationError(f"torch {torch.__version__} does not fit fastprompt._native_cuda: {error}") from None
    return extension


def not_built_for(capability: tuple[int, int], archs: str) -> str | None:
    """Why code for `archs` (such as "80;90a;100+PTX") does not run on a GPU of this compute capability, or None.

    Code runs on later minor versions of its own major one, with a letter on its very version only, as PTX on all later.
    """
    mine = 10 * capability[0] + capability[1]
    for arch in archs.split(";"):
        number = int("".join(c for c in arch.partition("+")[0] if c.isdigit()))
        exact = not arch.partition("+")[0].isdigit()
        same = number == mine if exact else number // 10 == capability[0] and number <= mine
        if same or (arch.endswith("+PTX") and number <= mine):
            return None
    return (
        f"fastprompt._native_cuda is built for sm_{archs.replace(';', ', sm_')} and the GPU is sm_{mine}; install with "
        f"FASTPROMPT_BUILD=cuda FASTPROMPT_CUDA_ARCHS={mine}"
        + ("" if mine >= 80 else ", which needs compute capability 8.0 or later")
    )


def _import(name: str) -> ModuleType:
    if importlib.util.find_spec(f"fastprompt.{name}") is None:
        raise ImplementationError(f"fastprompt.{name} is not built; {_NOT_BUILT[name]}")
    try:
        return importlib.import_module(f"fastprompt.{name}")
    except ImportError as error:
        raise ImplementationError(f"fastprompt.{name} cannot be loaded: {error}") from None
