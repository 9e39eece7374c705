"""The Triton kernels as compiled for a GPU that is not here, run by `ptx_machine` on tensors of the CPU.

As `triton_kernels/compiled.py`, but what is launched also runs. Must be imported where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from ptx_machine import Copies, Memory, launch, parse
from triton_kernels.compiled import elsewhere

from fastprompt import env

_PACKED = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "i1": "?", "i8": "b"}


@contextmanager
def running(target: str, when: Copies = Copies.EARLY, seed: int | None = None) -> Iterator[list[str]]:
    """What is launched meanwhile runs, compiled for this target; the names of the kernels that did."""
    ran: list[str] = []
    parsed: dict[str, Any] = {}

    def launched(kernel: Any, programs: int, on: Any, tile: Any, *args: Any, **meta: Any) -> None:
        if programs == 0:
            return
        kernel.device_caches.clear()
        binary = kernel.run(*args, **meta, grid=(programs,), warmup=True, num_warps=tile.warps, num_stages=tile.stages)
        text = binary.asm["ptx"]
        if text not in parsed:
            (parsed[text],) = parse(text)
        program, memory = parsed[text], Memory()
        named = dict(zip(kernel.arg_names, args, strict=False)) | meta
        values = [pair for name, kind in binary.src.signature.items() for pair in _flat(kind, named.get(name))]
        params = _packed(program, values, memory)
        launch(program, memory, params, programs, 32 * tile.warps, binary.metadata.shared, when=when, seed=seed)
        memory.fetch()
        ran.append(kernel.__name__)

    with elsewhere(target, launched), mock.patch.object(env, "triton_interpreted", return_value=True):  # on the CPU
        yield ran


def _flat(kind: Any, value: Any) -> list[tuple[str, Any]]:
    """A kernel's argument as its parameters; constants are none."""
    if isinstance(kind, (tuple, list)):
        return [pair for k, v in zip(kind, value, strict=True) for pair in _flat(k, v)]
    return [] if kind == "constexpr" else [(kind, value)]


def _packed(program: Any, values: list[tuple[str, Any]], memory: Memory) -> bytes:
    """Parameters where the program expects them; those that Triton adds for itself are null."""
    out = bytearray(program.param_bytes)
    offsets = list(program.params.values())
    assert len(values) <= len(offsets) <= len(values) + 2, (len(values), len(offsets))
    for offset, (kind, value) in zip(offsets, values, strict=False):
        if kind.startswith("*"):
            struct.pack_into("Q", out, offset, memory.place(value, writable=True))
        else:
            struct.pack_into(_PACKED[kind], out, offset, value)
    return bytes(out)
