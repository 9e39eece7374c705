"""Calls of every kind for the native attention kernels, and how exact their results must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from unittest import mock

import torch
from op_cases import VARIANTS, Attention, attention, doubled, results, rounding
from torch import Tensor

from fastprompt import reference

NATIVE = [variant for variant in VARIANTS if variant.startswith("cpu-")]
NAN = float("nan")
TOKENS = 340  # of an arena
TENSORS = (
    "q", "k", "v", "prefix_k", "prefix_v", "prefix_start", "prefix_len", "sinks", "bias", "prefix_bias",
    "kv_start", "kv_len", "q_start",
)  # fmt: skip
LAYOUTS = ("plain", "tokens_first", "gaps", "repeated")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DIMS = ((64, 64), (8, 8), (80, 32), (33, 17), (1, 1), (32, 96), (3, 40), (48, 5), (256, 256))
HEADS = ((4, 2), (1, 1), (3, 3), (6, 1), (16, 1), (12, 4), (5, 1), (3, 1))
_WORK = 6_000_000  # most products of queries and keys in a call, counted in numbers


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Work is shared among so many of torch's threads."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` `[..., heads, tokens, d]` as models hold such tensors.

    `tokens_first` has heads after tokens; `gaps` is a part of wider rows whose other numbers are NaN, and begins at an
    odd address; `repeated` is the first row of the batch for all.
    """
    if layout == "tokens_first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "gaps":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 4), NAN)
        wide[..., 1:-3] = x
        return wide[..., 1:-3]
    return x[:1].expand_as(x) if layout == "repeated" and x.dim() == 4 else x


def index_of(random: Random, x: Tensor) -> Tensor:
    """An index of either width, contiguous or not."""
    x = x.long() if random.random() < 0.5 else x
    return torch.stack([x, torch.full_like(x, -77)], -1)[..., 0] if random.random() < 0.5 else x


def poisoned(call: Attention) -> Attention:
    """The call with NaN wherever no row may look: in padding, and in arena tokens that nobody reads."""
    t = call.tensors
    size, tokens = t["k"].shape[2], t["prefix_k"].shape[1]
    j, slack = torch.arange(size), torch.ones(tokens, dtype=torch.bool)
    padding = torch.zeros(t["k"].shape[0], size, dtype=torch.bool)
    if "kv_start" in t:
        padding |= j < t["kv_start"][:, None]
    if "kv_len" in t:
        padding |= j >= t["kv_len"][:, None]
    for start, length in zip(t["prefix_start"].tolist(), t["prefix_len"].tolist(), strict=True):
        if length:
            slack[start : start + length] = False
    hidden = {"k": padding[:, None, :, None], "v": padding[:, None, :, None]}
    hidden |= {"prefix_k": slack[None, :, None], "prefix_v": slack[None, :, None]}
    return call.with_tensors(**{n: t[n].masked_fill(mask, NAN) for n, mask in hidden.items()})


def any_extents(random: Random, rows: int) -> list[tuple[int, int]]:
    """What each row reads: some prompts of an arena, which may overlap, read by several rows or one; or none."""
    lengths = random.choices([1, 2, 5, 13, 16, 31, 40, 70, 257, 300], k=random.randint(1, 4))
    prompts = [(random.randint(0, TOKENS - n), n) for n in lengths]
    prompts.append((random.choice([0, -7, 10**6]), 0))  # whose start means nothing
    return random.choices(prompts, k=rows)


def any_call(random: Random) -> Attention:
    """A call with any arguments, of a size that takes milliseconds."""
    queries = random.choice([0, 1, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 70])
    keys = random.choice([0, 1, 2, 3, 7, 16, 33, 70, 130, 257, 300])
    heads, dims = random.choice(HEADS), random.choice(DIMS)
    row = heads[0] * max(queries, 1) * (keys + 100) * max(dims)
    rows = random.randint(1, max(1, min(12, _WORK // row)))
    settings = {
        "causal": random.random() < 0.5,
        "window": random.choice([None, None, None, 1, 2, 9, 40, 290]),
        "softcap": random.choice([None, None, 2.0]),
        "scale": random.choice([None, None, None, 0.4, -0.3, 0.0]),
        "sinks": random.random() < 0.3,
    }
    if random.random() < 0.3:
        settings["bias"] = tuple(random.choice([1, n]) for n in (rows, heads[0], queries))
    for name, least, most in (("kv_start", -9, keys + 1), ("kv_len", -1, keys + 1), ("q_start", -3, keys + 3)):
        if random.random() < 0.3:
            settings[name] = [random.randint(least, most) for _ in range(rows)]
    call = attention(
        any_extents(random, rows), queries=queries, keys=keys, heads=heads, dims=dims, tokens=TOKENS,
        dtype=random.choice(DTYPES), seed=random.getrandbits(16), **settings,
    )  # fmt: skip
    dirty = poisoned(call)
    for name, x in call.tensors.items():
        if name in TENSORS[:5]:
            layout = random.choice(LAYOUTS)
            held = x if layout == "repeated" else dirty.tensors[name]  # another row may look where the first may not
            call = call.with_tensors(**{name: laid_out(held, layout)})
        elif not x.is_floating_point():
            call = call.with_tensors(**{name: index_of(random, x)})
    return call


@dataclass(frozen=True)
class Paged:
    """Arguments of one paged_prefix_attention call, and settings by name."""

    args: list[Tensor]
    settings: dict

    def __call__(self, op: Callable, **more) -> dict[str, Tensor]:
        out, lse = op(*self.args, **self.settings, return_lse=True, **more)
        return {"out": out, "lse": lse}

    def doubled(self) -> Paged:
        return Paged(doubled(self.args), self.settings)


def any_paged(random: Random) -> Paged:
    """A batch of prefill and decode rows in pages of any order; slots that no token fills hold NaN."""
    size, dtype = random.choice([1, 7, 16, 32]), random.choice(DTYPES)
    (hq, hkv), dims = random.choice(HEADS), random.choice(DIMS)
    counts = random.choices([0, 1, 1, 1, 2, 5, 17, 40], k=random.randint(1, max(1, min(9, 9000 // (hq * max(dims))))))
    lens = [n + random.choice([0, 0, 1, 9, 40, 120, 300]) for n in counts]
    pages = [-(-n // size) for n in lens]
    blocks = list(range(sum(pages) + 3))
    if random.random() < 0.5:
        random.shuffle(blocks)
    gen = torch.Generator().manual_seed(random.getrandbits(16))
    table = torch.full((len(lens), max(pages) + 1), random.choice([-1, 10**6]), dtype=torch.int32)
    shape = {"pages": (len(blocks), size, hkv), "heads": (len(blocks), hkv, size)}
    layout = random.choice(["pages", "heads", "pairs"])
    if layout == "pairs":  # keys and values of a page beside each other
        both = torch.full((len(blocks), 2, size, hkv, max(dims)), NAN, dtype=dtype)
        caches = [both[:, i, ..., :e] for i, e in enumerate(dims)]
    else:
        caches = [torch.full((*shape[layout], e), NAN, dtype=dtype) for e in dims]
        caches = [x.transpose(1, 2) if layout == "heads" else x for x in caches]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=gen).to(dtype)

    for b, count in enumerate(pages):
        mine = [blocks.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(mine[:: random.choice([1, -1])])
        for i, block in enumerate(table[b, :count].tolist()):
            for cache in caches:
                filled = cache[block, : lens[b] - i * size]
                filled.copy_(draw(*filled.shape))
    q_start = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    start, length = (torch.tensor(x, dtype=torch.int32) for x in zip(*any_extents(random, len(lens)), strict=True))
    indices = [index_of(random, x) for x in (table, q_start, torch.tensor(lens, dtype=torch.int32))]
    extents = [index_of(random, x) for x in (start, length)]
    q = laid_out(draw(sum(counts), hq, dims[0]), random.choice(["plain", "gaps"]))
    settings = {
        "window": random.choice([None, None, 1, 9, 290]),
        "softcap": random.choice([None, 2.0]),
        "scale": random.choice([None, 0.4, -0.3]),
        "sinks": draw(hq) if random.random() < 0.3 else None,
    }
    return Paged([q, *caches, *indices, *(draw(hkv, TOKENS, e) for e in dims), *extents], settings)


def plain(function: Callable, *args, **settings):
    """The oracle, with everything computed in the dtype of the inputs."""
    with mock.patch.object(reference, "_wide", lambda x: x):
        return function(*args, **settings)


def exact_and_bounds(call: Attention, **more) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a call must give, outputs and gradients, and by how much it may miss that."""
    t, oracle = call.tensors, reference.prefix_attention
    exact = results(call.map(Tensor.double), oracle, **more)
    usual = None if t["q"].dtype == torch.float32 else plain(results, call, oracle, **more)
    terms = t["q"].shape[3] + t["v"].shape[3] + int(t["prefix_len"].max()) + t["k"].shape[2]
    summed = {
        f"d{n}": t["q"][..., 0].numel() / max(1, t[n].numel()) for n in ("sinks", "bias", "prefix_bias") if n in t
    }
    return exact, bounds(exact, usual, t["q"].dtype, terms, summed)


def bounds(
    exact: dict[str, Tensor],
    usual: dict[str, Tensor] | None,
    dtype: torch.dtype,
    terms: int,
    summed: dict[str, float] | None = None,
) -> dict[str, float]:
    """By how much results may miss the exact ones.

    Half precision: twice the error of plain PyTorch, and the rounding of the result and of the output that a gradient
    starts from. Float32, as `lse` always is: what sums of so many terms may lose. Both in parts of the largest number,
    or of 1 if all are smaller; where `summed` gradients make one, roundings add up as their root.
    """
    found = {}
    for name, want in exact.items():
        single = usual is None or name == "lse"
        error = 0.0 if single else largest(usual[name].double() - want)
        step = rounding(torch.float32, terms) if single else 2 * torch.finfo(dtype).eps
        step *= max(1.0, (summed or {}).get(name, 1.0)) ** 0.5
        found[name] = 2 * error + step * max(1.0, largest(want))
    return found


def largest(x: Tensor) -> float:
    """The size of the largest finite number."""
    return max(x[x.isfinite()].abs().flatten().tolist(), default=0.0)


def assert_within(got: dict[str, Tensor], exact: dict[str, Tensor], bounds: dict[str, float], what: object) -> None:
    """Equal within bounds, -inf where that is the result, and no NaN."""
    for name, want in exact.items():
        assert torch.equal(got[name].isfinite(), want.isfinite()), f"{name} is not finite where it should be: {what}"
        error = largest(got[name].double() - want)
        assert error <= bounds[name], f"{name} is off by {error:.3g}, allowed are {bounds[name]:.3g}: {what}"


def described(variant: str, tensors: dict[str, Tensor] | list[Tensor], settings: dict) -> str:
    """A call in words, for a failing test."""
    named = dict(tensors) if isinstance(tensors, dict) else dict(enumerate(tensors))
    shown = (f"{n} {(tuple(x.shape), x.stride()) if x.is_floating_point() else x.tolist()}" for n, x in named.items())
    return f"{variant}, {next(iter(named.values())).dtype}, {settings}, {', '.join(shown)}"
