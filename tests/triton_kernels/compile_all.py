"""Compiles every kernel in every configuration of the table for one target and prints a line for each.

`python tests/triton_kernels/compile_all.py sm_90` prints CSV; `record` in place of a target writes that of all targets
into bench/results/aot.csv.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from compiled import TARGETS, Compiled, compiling

from fastprompt import dispatch
from fastprompt.arguments import EmbedPrompts, PagedPrefixAttention, PrefixAttention
from fastprompt.plan import BatchPlan

COLUMNS = ("target", "kernel", "case", "warps", "stages", "registers", "spilled", "stack", "shared", "tensor_core")
RECORD = Path(__file__).parents[2] / "bench" / "results" / "aot.csv"
_TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")  # their instructions, best first


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(dim: int, dtype: torch.dtype, *, queries: int = 1024, rich: bool = False, grad: bool = True) -> None:
    """16 rows of 32/8 heads, 16 prompts of 128 tokens; rich: with every argument there is."""
    op = dispatch.kernels("prefix_attention", "triton")
    rows, heads, kv_heads, tokens = 16, 32, 8, 2048
    own = [empty(rows, h, n, dim, dtype=dtype) for h, n in ((heads, queries), (kv_heads, 1024), (kv_heads, 1024))]
    inputs = [*own, *(empty(kv_heads, tokens, dim, dtype=dtype) for _ in range(2)), empty(rows), empty(rows)]
    extra: list = [None] * 6
    if rich:
        bias = [empty(1, heads, queries, n, dtype=dtype) for n in (1024, 128)]
        extra = [empty(heads, dtype=dtype), *bias, *(empty(rows) for _ in range(3))]
    numbers = (True, dim**-0.5, 512 if rich else None, 30.0 if rich else None)
    call = PrefixAttention(*inputs, *extra, *numbers)
    out, lse = op.forward(call, None, True)
    if grad:
        op.backward(out, lse, out, lse, call, None, [True] * 8)


def paged(dim: int, dtype: torch.dtype, *, rows: int, tokens: int, shared: bool = False, rich: bool = False) -> None:
    """Rows of 32/8 heads over pages of 16 tokens, up to 4096 a row; shared: some read their prefix together.

    rich: with every argument there is, but for a window where prefixes are shared, which it rules out.
    """
    op = dispatch.kernels("paged_prefix_attention", "triton")
    heads, kv_heads = 32, 8
    caches = [empty(9000, 16, kv_heads, dim, dtype=dtype) for _ in range(2)]
    arenas = [empty(kv_heads, 2048, dim, dtype=dtype) for _ in range(2)]
    indices = [empty(rows, 256), empty(rows + 1), empty(rows)]
    lists = BatchPlan.build([0] * rows, [0] * rows, capacity_rows=rows, queries=[1] * rows, device="meta").sharing
    sinks = empty(heads, dtype=dtype) if rich else None
    args = (empty(tokens, heads, dim, dtype=dtype), *caches, *indices, *arenas, empty(rows), empty(rows), sinks)
    window = 512 if rich and not shared else None
    call = PagedPrefixAttention(*args, dim**-0.5, window, 30.0 if rich else None)
    op.forward(call, None, lists if shared else None, rich)


def merge_states() -> None:
    op = dispatch.kernels("merge_states", "triton")
    states = [empty(4, 64, 32, 128, dtype=torch.bfloat16), empty(4, 32, 64, dtype=torch.float32)] * 2
    op.forward(*states)
    op.backward(*states[:2], *states)


def embed_prompts() -> None:
    op = dispatch.kernels("embed_prompts", "triton")
    tables = [empty(n, 4096, dtype=torch.bfloat16) for n in (32000, 2048)]
    for positions in (None, empty(16, 128)):
        ids, extents = empty(16, 512, dtype=torch.int64), (empty(16), empty(16), positions, None, empty(16))
        call = EmbedPrompts(ids, *tables, *extents, True, 640, None)
        op.backward(op.forward(call), call, [True, True])


def grouped_linear(dtype: torch.dtype) -> None:
    op = dispatch.kernels("grouped_linear", "triton")
    x, weight, bias = (empty(*s, dtype=dtype) for s in ((16, 64, 1024), (300, 1024), (300,)))
    args = (x, weight, bias, empty(16), empty(16))
    op.backward(op.forward(*args, 40), *args, [True] * 3)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """What is compiled, by name."""
    half, single = torch.bfloat16, torch.float32
    for dim in (64, 128, 256):
        yield f"bf16 D{dim}", lambda d=dim: attention(d, half)
        yield f"fp32 D{dim}", lambda d=dim: attention(d, single, grad=d <= 128)
    yield "fp16 D80", lambda: attention(80, torch.float16, grad=False)
    yield "bf16 D128 all arguments", lambda: attention(128, half, rich=True)
    for dim in (64, 128):
        yield f"fp32 D{dim} all arguments", lambda d=dim: attention(d, single, rich=True)
    yield "bf16 D128 one query", lambda: attention(128, half, queries=1, grad=False)
    for rows in (4, 64):  # the keys of a few programs are cut into parts
        yield f"bf16 D128 {rows} rows of a query", lambda n=rows: paged(128, half, rows=n, tokens=n)
    yield "bf16 D128 64 rows of 64 queries", lambda: paged(128, half, rows=64, tokens=4096)
    for dim in (64, 128, 256):
        yield f"bf16 D{dim} prefixes read together", lambda d=dim: paged(d, half, rows=128, tokens=128, shared=True)
    yield "fp32 D128 prefixes read together", lambda: paged(128, single, rows=128, tokens=128, shared=True)
    yield "bf16 D128 prefill and prefixes read together", lambda: paged(128, half, rows=64, tokens=4096, shared=True)
    yield "bf16 D128", merge_states
    yield "bf16 E4096", embed_prompts
    yield "bf16 E1024", lambda: grouped_linear(half)
    yield "fp32 E1024", lambda: grouped_linear(single)
    for dim in (64, 256):
        yield f"bf16 D{dim} one query", lambda d=dim: attention(d, half, queries=1, grad=False)
        yield f"bf16 D{dim} all arguments", lambda d=dim: attention(d, half, rich=True)
    for queries in (8, 16):  # tiles of 32 and 64 rows
        yield f"bf16 D128 {queries} queries", lambda n=queries: attention(128, half, queries=n, grad=False)
    yield "fp32 D256 all arguments", lambda: attention(256, single, rich=True, grad=False)
    yield "bf16 D128 pages with all arguments", lambda: paged(128, half, rows=128, tokens=8192, rich=True)
    yield (
        "bf16 D128 all arguments and prefixes read together",
        lambda: paged(128, half, rows=128, tokens=128, shared=True, rich=True),
    )


def lines(target: str) -> Iterator[dict[str, object]]:
    """What each compiled kernel takes, as rows of the record."""
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases():
            with compiling(target, Path(folder)) as found:
                case()
            yield from (_line(name, one) for one in found)


def _line(case: str, one: Compiled) -> dict[str, object]:
    used = next((name for name in _TENSOR_CORES if name in one.listing), "")
    return {name: getattr(one, name, None) for name in COLUMNS} | {"case": case, "tensor_core": used}


def write(targets: Iterable[str], file: TextIO) -> None:
    """A header and the lines of these targets, each as soon as it is known."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for target in targets:
        for line in lines(target):
            writer.writerow(line)
            file.flush()


if __name__ == "__main__":
    if sys.argv[1] == "record":
        with RECORD.open("w") as record:
            write(TARGETS, record)
    else:
        write(sys.argv[1:], sys.stdout)
