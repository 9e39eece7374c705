"""What prefix attention allocates and keeps: no copy of a prefix in a call, no growth over many calls.

Two checks. `copies`: one call over prefixes so large that nothing else in it comes near them; what torch allocates in
it, and by how much the process grows at its peak (which sees memory that is not torch's), stay far below them.
`growth`: many calls of small decoding steps, each of another shape, after which the process is as large as after the
first tenth of them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench import options, session
from bench.attention_baselines import ours
from bench.attention_cases import Case
from bench.attention_inputs import DTYPES, build
from bench.memory import allocated, peak_growth, resident
from fastprompt import dispatch
from fastprompt.ops import prefix_attention

_GROWTH = 8 << 20  # bytes: what an allocator may keep more of after hours than after the first tenth
_OF_PREFIX = 0.25  # of the prefixes' bytes: a copy of only one of keys and values would be 0.5
_HEADS = ((8, 8), (8, 2), (12, 12), (16, 1))
_DIMS = (32, 64, 80, 128)
_MOST = (8, 16, 4, 64, 48, 128)  # rows, heads, queries, own keys, virtual tokens, head size of the small calls
_LARGE = (
    Case(8, 1, 8192, 1, 16, (8, 8), 128),
    Case(8, 8, 1024, 1, 16, (8, 8), 128),
    Case(8, 8, 1024, 1, 16, (32, 8), 128, ragged=True),
    Case(8, 8, 1024, 32, 32, (8, 8), 128, strided=True),
)


@dataclass(frozen=True)
class Reading:
    """Something measured in bytes, and the most it may be."""

    what: str
    bytes: int
    most: int

    @property
    def met(self) -> bool:
        return self.bytes <= self.most

    def describe(self) -> str:
        verdict = "pass" if self.met else "FAIL"
        return f"{self.what}: {self.bytes / 2**20:.2f} MiB, at most {self.most / 2**20:.2f} MiB: {verdict}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench prefix-attention-memory`."""
    parser.add_argument(
        "--calls", type=int, default=100_000, metavar="N", help="calls of changing shapes (default: 100000)"
    )
    options.add(parser, "impl", "threads", "out")


def run(args: argparse.Namespace) -> int:
    """Runs both checks and prints what was measured; 1 where it was more than it may be."""
    impl = dispatch.choose("prefix_attention", args.impl, torch.device("cpu"), torch.float32)
    failed = 0
    with session.opened(args, "prefix-attention-memory", impl=impl) as journal, torch.no_grad():
        for reading in (*copies(impl), growth(impl, args.calls)):
            journal.write("memory", what=reading.what, bytes=reading.bytes, most=reading.most, met=reading.met)
            print(reading.describe(), flush=True)
            failed += not reading.met
    print(f"impl {impl}, {args.threads} threads: {failed} of the checks failed")
    return int(failed > 0)


def copies(impl: str) -> Iterator[Reading]:
    """What one call over large prefixes takes."""
    for case in _LARGE:
        for dtype in ("fp32", "bf16"):
            inputs = build(case, dtype)
            size = 2 * inputs.prefix_k.numel() * inputs.prefix_k.element_size()
            most = int(_OF_PREFIX * size)
            small = build(case.shrunk(), dtype)
            ours(case.shrunk(), impl).build(small)()  # loads what is loaded once
            call = ours(case, impl).build(inputs)
            about = f"{case.name} {dtype}, prefixes of {size / 2**20:.0f} MiB"
            yield Reading(f"{about}, growth at the peak of the first call", peak_growth(call), most)
            yield Reading(f"{about}, allocated by torch in a call", allocated(call), most)


def growth(impl: str, calls: int) -> Reading:
    """By how much the process grows over calls of changing shapes, from the first tenth of them on."""
    chance = random.Random(0)
    buffers = _Buffers()
    first = max(1, calls // 10)
    start, began = 0, time.perf_counter()
    for turn in range(1, calls + 1):
        _small_call(buffers, chance, impl)
        if turn == first:
            start = resident()
        if turn % first == 0:
            print(f"  {turn} calls, {resident() / 2**20:.1f} MiB, {time.perf_counter() - began:.0f} s", flush=True)
    return Reading(f"growth from call {first} to call {calls}", max(0, resident() - start), _GROWTH)


class _Buffers:
    """Memory that the small calls take their tensors from, so that they come at no cost and at any size."""

    def __init__(self) -> None:
        rows, heads, _, keys, prefix, dim = _MOST
        generator = torch.Generator().manual_seed(0)
        count = heads * dim * max(rows * keys, 2 * prefix)
        data = torch.randn(count, generator=generator)
        self._data = {name: data.to(DTYPES[name]) for name in ("fp32", "bf16")}

    def take(self, dtype: str, *shape: int) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        return self._data[dtype][:count].view(shape)


def _small_call(buffers: _Buffers, chance: random.Random, impl: str) -> None:
    """A decoding step of a random shape, rows of up to two prompts and of none."""
    most_rows, _, most_queries, most_keys, most_prefix, _ = _MOST
    rows, queries = chance.randint(1, most_rows), chance.choice((1, 1, 1, most_queries))
    keys, prefix = chance.randint(queries, most_keys), chance.randint(0, most_prefix)
    (heads, kv_heads), dim = chance.choice(_HEADS), chance.choice(_DIMS)
    dtype = chance.choice(("fp32", "bf16"))
    prompts = [chance.randint(0, 2) for _ in range(rows)]
    arena = buffers.take(dtype, kv_heads, 2 * prefix, dim)
    own = buffers.take(dtype, rows, kv_heads, keys, dim)
    prefix_attention(
        buffers.take(dtype, rows, heads, queries, dim), own, own, arena, arena,
        torch.tensor([prefix if p == 2 else 0 for p in prompts], dtype=torch.int32),
        torch.tensor([prefix if p else 0 for p in prompts], dtype=torch.int32), impl=impl,
    )  # fmt: skip
