"""The CUDA decode kernels compiled for the host machine of `machine/`, behind torch tensors.

The same headers as on a GPU; threads are coroutines, warp operations wait for all lanes (see machine/fibers.h).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHARERS = 16
CODES = {
    -1: "dtype", -2: "head_dim", -3: "heads", -4: "alignment", -5: "sizes", -6: "workspace", -7: "loads", -8: "chip"
}  # fmt: skip
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.float32: 3}
_I32, _I64, _F32, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Copies(IntEnum):
    """When asynchronous copies happen."""

    EAGER, LAZY, RANDOM = range(3)


class Loads(IntEnum):
    AUTO, ASYNC, BULK = range(3)


def _fields(spec: str) -> list[tuple[str, type]]:
    """A struct's fields, from lines of a type and names."""
    kinds = {"i": _I32, "l": _I64, "f": _F32, "p": _PTR}
    lines = (line.split(":") for line in spec.strip().splitlines())
    return [(name, kinds[kind.strip()]) for kind, names in lines for name in names.split()]


class Args(ctypes.Structure):
    """`fastprompt_decode_args` of csrc/cuda/decode.h."""

    _fields_ = _fields("""
        l: rows tokens
        i: heads kv_heads head_dim block_size
        l: arena_tokens max_blocks
        p: q
        i: dtype
        l: q_token_stride q_head_stride
        p: k_cache v_cache
        l: k_block_stride k_slot_stride k_head_stride v_block_stride v_slot_stride v_head_stride
        p: block_table
        l: block_table_stride
        p: kv_len q_start prefix_k prefix_v
        i: prefix_dtype
        l: prefix_k_head_stride prefix_k_token_stride prefix_v_head_stride prefix_v_token_stride
        p: prefix_start prefix_len prefix_k_scale prefix_v_scale
        f: scale softcap
        l: window
        p: sinks
        i: sinks_dtype
        p: tile_of_row tiles
        l: num_tiles
        p: out lse workspace
        l: workspace_bytes
        i: device loads
        p: stream
    """)


class Chip(ctypes.Structure):
    """`fastprompt_chip`."""

    _fields_ = _fields("i: multiprocessors shared_per_multiprocessor shared_per_block capability")


class Schedule(ctypes.Structure):
    """`fastprompt_decode_schedule_t`."""

    _fields_ = _fields("""
        i: blocks warps stages shared_bytes alone_parts shared_parts merge_blocks bulk
        l: workspace_bytes
    """)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, _ in self._fields_}


def chip(capability: int, multiprocessors: int) -> Chip:
    """A chip with so many multiprocessors and the shared memory of its kind."""
    per_multiprocessor = {75: 64, 80: 164, 89: 100, 90: 228, 100: 228}[capability] << 10
    return Chip(multiprocessors, per_multiprocessor, per_multiprocessor - 1024, capability)


@dataclass(frozen=True)
class Machine:
    """The shared object of decode_on_host.cpp."""

    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path, edit: tuple[str, str, str] | None = None) -> Machine:
        """Compiles it; with an edit (header of csrc/cuda, text, what replaces it) only heads of 64 bfloat16."""
        target = folder / "decode_on_host.so"
        places, flags = [ROOT / "tests" / "cuda", ROOT / "csrc"], ["-std=c++17", "-O2", "-shared", "-fPIC"]
        flags += ["-Wno-unknown-pragmas"]
        if edit is None:
            flags += ["-Wall", "-Wextra", "-Werror"]
        else:
            header, old, new = edit
            shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
            text = (folder / "cuda" / header).read_text()
            assert text.count(old) == 1, f"{header} holds {old!r} {text.count(old)} times"
            (folder / "cuda" / header).write_text(text.replace(old, new))
            places.insert(0, folder)
            flags += ["-DFASTPROMPT_HOST_ONE_INSTANCE"]
        source = ROOT / "tests" / "cuda" / "decode_on_host.cpp"
        include = [f"-I{place}" for place in places]
        subprocess.run(["g++", *flags, *include, str(source), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
        library.fastprompt_host_decode.restype = ctypes.c_char_p
        library.fastprompt_host_decode.argtypes = [_PTR, _PTR, ctypes.c_int, ctypes.c_uint64]
        library.fastprompt_host_schedule.argtypes = [_PTR, _PTR, _PTR]
        return cls(library)

    def schedule(self, args: Args, on: Chip) -> Schedule | int:
        """How a call runs, or the code of what is wrong with it."""
        found = Schedule()
        code = self.library.fastprompt_host_schedule(ctypes.byref(args), ctypes.byref(on), ctypes.byref(found))
        return code or found

    def run(self, args: Args, schedule: Schedule, copies: Copies = Copies.RANDOM, seed: int = 0) -> None:
        room = torch.full((schedule.workspace_bytes // 4 + 4,), float("nan"))
        args.workspace, args.workspace_bytes = _aligned(room), schedule.workspace_bytes
        error = self.library.fastprompt_host_decode(ctypes.byref(args), ctypes.byref(schedule), copies, seed)
        assert error is None, error.decode()


def _aligned(x: Tensor) -> int:
    return -(-x.data_ptr() // 16) * 16


def arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor | None,
    kv_len: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sharing: Tensor | None = None,
    prefix_scales: tuple[Tensor, Tensor] | None = None,
    loads: Loads = Loads.AUTO,
) -> Args:
    """The C arguments of a call, which keep its tensors as `tensors`. `sharing` is that of a plan."""
    (tokens, heads, dim), (_, size, kv_heads, _) = q.shape, k_cache.shape
    rows = kv_len.shape[0]
    a = Args(rows=rows, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=dim, block_size=size)
    a.arena_tokens, a.max_blocks, a.dtype = prefix_k.shape[1], block_table.shape[1], _DTYPES[q.dtype]
    a.q_token_stride, a.q_head_stride = q.stride()[:2]
    a.k_block_stride, a.k_slot_stride, a.k_head_stride = k_cache.stride()[:3]
    a.v_block_stride, a.v_slot_stride, a.v_head_stride = v_cache.stride()[:3]
    a.block_table_stride, a.prefix_dtype = block_table.stride(0), _DTYPES[prefix_k.dtype]
    a.prefix_k_head_stride, a.prefix_k_token_stride = prefix_k.stride()[:2]
    a.prefix_v_head_stride, a.prefix_v_token_stride = prefix_v.stride()[:2]
    scales = prefix_scales or (None, None)
    pointers = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "kv_len": kv_len,
        "q_start": q_start, "prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_start": prefix_start,
        "prefix_len": prefix_len, "prefix_k_scale": scales[0], "prefix_v_scale": scales[1], "sinks": sinks,
        "out": out, "lse": lse,
    }  # fmt: skip
    for name, tensor in pointers.items():
        setattr(a, name, None if tensor is None else tensor.data_ptr())
    a.tensors = {**{n: x for n, x in pointers.items() if x is not None}, "sharing": sharing}
    a.scale, a.softcap, a.window = scale or dim**-0.5, softcap or 0.0, window or 0
    a.sinks_dtype = _DTYPES[torch.float32 if sinks is None else sinks.dtype]
    if sharing is not None:
        tiles, rest = divmod(sharing.shape[0], 4 + SHARERS)
        a.tile_of_row, a.num_tiles = sharing.data_ptr(), tiles
        a.tiles = sharing.data_ptr() + 4 * (4 * tiles + rest)
    a.loads = loads
    return a
