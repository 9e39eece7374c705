"""The native extension `fastprompt._native`: why it cannot run here, and loading it with torch's threads."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastprompt import env
from fastprompt.errors import ArgumentError, ImplementationError

_NOT_BUILT = (
    "fastprompt._native is not built; install fastprompt where a C++17 compiler works (FASTPROMPT_BUILD=cpu says what "
    "is missing), or set FASTPROMPT_IMPL=reference"
)


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
    native = _import()
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


def _import() -> ModuleType:
    if importlib.util.find_spec("fastprompt._native") is None:
        raise ImplementationError(_NOT_BUILT)
    try:
        return importlib.import_module("fastprompt._native")
    except ImportError as error:
        raise ImplementationError(f"fastprompt._native cannot be loaded: {error}") from None
