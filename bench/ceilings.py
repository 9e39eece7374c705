"""What the machine can do at best: bytes read and operations done a second, and a call's share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import machine, measure
from bench.attention_cases import Case
from bench.attention_inputs import DTYPES, Inputs
from bench.measure import Contestant
from fastprompt import native

_CLEAR = 2.0  # times the other one that a floor must be for it alone to be the bound
_ROUNDS = 8
_TRIES = 4
_SHAPES = ((512, 2048, 2048), (1024, 1024, 1024), (2048, 2048, 2048))  # M, N, K
_ALSO = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "fp16": ("fp16", "fp32")}  # a kernel may convert as it reads


@dataclass(frozen=True)
class Ceiling:
    """The best of several ways, a second, which one it was, and whether other processes let it be."""

    rate: float
    how: str
    quiet: bool


@dataclass(frozen=True)
class Ceilings:
    """Bytes read from memory far beyond the caches, and floating point operations of matrix products by dtype."""

    memory: Ceiling
    matrix: Mapping[str, Ceiling]


@dataclass(frozen=True)
class Work:
    """What a call must do at least: floating point operations, and bytes, each counted once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Share:
    """A call's share of the ceiling that binds: the least time the machine needs, over the time taken.

    `bound` is "memory" or "compute" where that floor is clearly the higher one, else "both".
    """

    gflops: float
    gbs: float
    floor: float
    share: float
    bound: str


def of_machine(dtypes: list[str], clock: str, quick: bool = False) -> Ceilings:
    """The ceilings of torch's threads on `clock`, "wall" or "cpu".

    What `fastprompt.native.matrix_rate(dtype)` gives counts too, where there is such a function.
    """
    needed = {name for dtype in dtypes for name in _ALSO[dtype]}
    rates = {name: _matrix(name, clock, quick) for name in sorted(needed)}
    matrix = {dtype: max((rates[name] for name in _ALSO[dtype]), key=lambda c: c.rate) for dtype in dtypes}
    return Ceilings(_memory(clock, quick), matrix)


def work(case: Case, x: Inputs) -> Work:
    """Products with visible keys only; each tensor read or written once, of keys those some query sees."""
    rows, heads, queries, dim = x.q.shape
    if x.mask is None:
        seen = rows * queries * (x.longest + x.k.shape[2])
        own = rows * x.k.shape[2]
    else:
        mask = x.mask.expand(rows, -1, -1, -1)
        seen, own = int(mask.sum()), int(mask[..., x.longest :].any(2).sum())
    kv = 2 * (own + x.prefix_k.shape[1]) * x.k.shape[1] * dim
    q_and_out = 2 * rows * heads * queries * dim
    flops = 4.0 * heads * dim * seen
    if not case.backward:
        return Work(flops, (kv + q_and_out) * x.q.element_size())
    # five more products; every tensor again as its gradient
    return Work(3.5 * flops, 2 * (kv + q_and_out) * x.q.element_size())


def share(needed: Work, seconds: float, ceilings: Ceilings, dtype: str) -> Share:
    """How near a call that took `seconds` came to what the machine can do."""
    memory = needed.bytes / ceilings.memory.rate
    compute = needed.flops / ceilings.matrix[dtype].rate
    floor = max(memory, compute)
    bound = "memory" if memory >= _CLEAR * compute else "compute" if compute >= _CLEAR * memory else "both"
    return Share(needed.flops / seconds / 1e9, needed.bytes / seconds / 1e9, floor, floor / seconds, bound)


def _memory(clock: str, quick: bool) -> Ceiling:
    """The best of torch's reductions; a loop of vector loads in C++ measured the same."""
    size = (1 if quick else 8) * machine.last_level_cache() // 4
    x = torch.ones(size // 1024, 1024)
    flat = x.view(-1)
    ways: dict[str, Callable[[], Any]] = {
        "torch.amax": flat.amax, "torch.dot": lambda: torch.dot(flat, flat), "torch.sum of rows": lambda: x.sum(1),
    }  # fmt: skip
    return _best({how: (run, flat.numel() * 4) for how, run in ways.items()}, clock, 1 if quick else _ROUNDS)


def _matrix(dtype: str, clock: str, quick: bool) -> Ceiling:
    ways: dict[str, tuple[Callable[[], Any], float]] = {}
    for m, n, k in ((64, 64, 64),) if quick else _SHAPES:
        a, b = torch.randn(m, k).to(DTYPES[dtype]), torch.randn(n, k).to(DTYPES[dtype])
        flops = 2.0 * m * n * k
        ways[f"torch.mm {m}x{n}x{k}"] = (partial(torch.mm, a, b.T), flops)
    best = _best(ways, clock, 1 if quick else _ROUNDS)
    own = _native_rate(dtype)
    return best if own is None or own <= best.rate else Ceiling(own, "fastprompt.native.matrix_rate", best.quiet)


def _best(ways: Mapping[str, tuple[Callable[[], Any], float]], clock: str, rounds: int) -> Ceiling:
    """The way that does most a second in its best run, the ways taking turns; again where other processes ran."""
    contestants = {how: Contestant(run, lambda _: None) for how, (run, _amount) in ways.items()}
    measure.interleave(contestants, 1)
    found: list[Ceiling] = []
    while len(found) < (_TRIES if rounds > 1 else 1) and not (found and found[-1].quiet):
        samples = measure.interleave(contestants, rounds)
        best = {how: min(runs, key=lambda s: getattr(s, clock)) for how, runs in samples.items()}
        rates = {how: ways[how][1] / getattr(sample, clock) for how, sample in best.items()}
        how = max(rates, key=rates.__getitem__)
        found.append(Ceiling(rates[how], how, best[how].quiet))
    return max(found, key=lambda ceiling: ceiling.rate)


def _native_rate(dtype: str) -> float | None:
    """What the native kernels' own matrix tile does a second, if they are built and tell."""
    rate = getattr(native, "matrix_rate", None)
    return None if rate is None or native.obstacle() is not None else float(rate(DTYPES[dtype]))
