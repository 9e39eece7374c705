"""Small calls of every op with every argument, made on the CPU; slack that nobody may read holds NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import checkout
from bench.gpu_check.calls import Call

EXTENTS = [(0, 40), (40, 64), (0, 40), (0, 0), (7, 100), (104, 17)]  # shared, lonely, absent and overlapping prompts
TOKENS = 140
_KINDS: dict[str, dict[str, Any]] = {
    "causal": {"queries": 70, "keys": 70, "heads": (4, 2), "dims": (64, 64)},
    "bidirectional, padded": {
        "queries": 37, "keys": 37, "heads": (4, 2), "dims": (64, 64), "causal": False, "padding": True,
    },
    "static cache": {
        "queries": 5, "keys": 90, "heads": (8, 2), "dims": (128, 128), "strided": True,
        "q_start": [3, 85, 40, 9, 60, 17], "kv_len": [8, 90, 45, 14, 65, 22],
    },
    "one query": {"queries": 1, "keys": 130, "heads": (32, 8), "dims": (128, 128), "strided": True},
    "window": {"queries": 130, "keys": 130, "heads": (4, 1), "dims": (128, 128), "window": 33, "padding": True},
    "bidirectional window": {
        "queries": 70, "keys": 70, "heads": (2, 2), "dims": (64, 64), "causal": False, "window": 9,
    },
    "softcap, sinks, biases": {
        "queries": 20, "keys": 33, "heads": (6, 2), "dims": (64, 64), "softcap": 2.0, "sinks": True,
        "bias": (6, 6, 20), "scale": 0.4,
    },
    "broadcast bias, sinks": {
        "queries": 9, "keys": 40, "heads": (4, 4), "dims": (80, 32), "sinks": True, "bias": (1, 4, 1), "strided": True,
    },
    "odd head sizes": {"queries": 19, "keys": 20, "heads": (5, 1), "dims": (33, 17)},
    "large heads": {"queries": 40, "keys": 40, "heads": (4, 1), "dims": (256, 256)},
    "no own keys": {"queries": 3, "keys": 0, "heads": (4, 2), "dims": (64, 64)},
}  # fmt: skip
_PAGED: dict[str, dict[str, Any]] = {
    "ragged": {"counts": [3, 1, 0, 70, 1, 17], "lens": [30, 1, 4, 130, 77, 17]},
    "one query": {"counts": [1] * 6, "lens": [3, 90, 4, 1, 257, 16], "heads": (32, 8)},
    "shared prefixes": {
        "counts": [1] * 18 + [3, 1, 1, 1, 1, 1], "lens": [1 + 37 * i % 90 for i in range(18)] + [9, 300, 1, 16, 40, 3],
        "extents": [(0, 400)] * 17 + [(0, 0), (0, 400)] + [(400, 500)] * 4 + [(900, 30)], "heads": (16, 4),
    },
    "cut into parts": {"counts": [1, 2, 1, 1, 1, 1], "lens": [2900, 800, 4, 1, 2048, 1700]},
    "decode, shared prefixes": {
        "counts": [1] * 23, "lens": [1 + 37 * i % 90 for i in range(23)],
        "extents": [(0, 400)] * 17 + [(0, 0)] + [(400, 500)] * 4 + [(900, 30)], "heads": (16, 4),
    },
    "decode, cut into parts": {"counts": [1] * 6, "lens": [2900, 800, 4, 1, 2048, 1700]},
    "decode, window": {"counts": [1] * 6, "lens": [30, 1, 4, 130, 77, 17], "window": 50, "dim": 96},
    "decode, small heads": {"counts": [1] * 6, "lens": [30, 1, 4, 130, 77, 17], "heads": (4, 4), "dim": 64},
    "decode, large heads, softcap, sinks": {
        "counts": [1] * 6, "lens": [30, 1, 4, 130, 77, 17], "heads": (16, 1), "dim": 256, "softcap": 2.0, "sinks": True,
    },
    "window, softcap, sinks": {
        "counts": [3, 1, 0, 20, 1, 1], "lens": [30, 1, 4, 130, 77, 17], "window": 50, "softcap": 2.0, "sinks": True,
    },
}  # fmt: skip


def attention(kind: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """prefix_attention, with gradients of everything."""
    checkout.find_cases()
    from cpu_cases import poisoned
    from op_cases import DIFFERENTIABLE
    from op_cases import attention as build

    given = dict(_KINDS[kind])
    if given.pop("padding", False):
        keys = given["keys"]
        given["kv_start"] = [0, 5, keys // 2, 1, 0, 11]
        given["kv_len"] = [keys, keys - 3, keys, keys, keys - 9, keys - 1]
    made = poisoned(build(EXTENTS, tokens=TOKENS, dtype=dtype, seed=seed, **given))
    names = tuple(name for name in DIFFERENTIABLE if name in made.tensors)
    terms = sum(given["dims"]) + 100 + given["keys"]
    return Call("prefix_attention", made.tensors, names, made.settings | {"return_lse": True}, terms)


def paged(kind: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """paged_prefix_attention over shuffled pages."""
    given = dict(_PAGED[kind])
    counts, lens, extents = given.pop("counts"), given.pop("lens"), given.pop("extents", EXTENTS)
    longest = max(n for _, n in extents)
    tokens = max(TOKENS, *(start + n for start, n in extents))
    heads, dim, size = given.pop("heads", (8, 2)), given.pop("dim", 128), 16
    gen = torch.Generator().manual_seed(seed)
    pages = [-(-n // size) for n in lens]
    order = torch.randperm(sum(pages) + 3, generator=gen).int()
    table = torch.full((len(lens), max(pages) + 1), -1, dtype=torch.int32)
    caches = [torch.full((sum(pages) + 3, size, heads[1], dim), torch.nan, dtype=dtype) for _ in range(2)]
    at = 0
    for b, count in enumerate(pages):
        table[b, :count] = order[at : at + count]
        at += count
        for cache in caches:
            for i, page in enumerate(table[b, :count].tolist()):
                filled = cache[page, : lens[b] - i * size]
                filled.copy_(_normal(gen, dtype, *filled.shape))
    start, length = (torch.tensor(column, dtype=torch.int32) for column in zip(*extents, strict=True))
    tensors = {
        "q": _normal(gen, dtype, sum(counts), heads[0], dim), "k_cache": caches[0], "v_cache": caches[1],
        "block_table": table, "q_start": torch.tensor([0, *counts]).cumsum(0).int(),
        "kv_len": torch.tensor(lens, dtype=torch.int32), "prefix_k": _normal(gen, dtype, heads[1], tokens, dim),
        "prefix_v": _normal(gen, dtype, heads[1], tokens, dim), "prefix_start": start, "prefix_len": length,
    }  # fmt: skip
    if given.pop("sinks", False):
        tensors["sinks"] = _normal(gen, dtype, heads[0])
    terms = 2 * dim + longest + max(lens)
    return Call("paged_prefix_attention", tensors, (), given | {"return_lse": True}, terms, tuple(counts))


def embed(kind: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """embed_prompts, padded on a side or with virtual tokens anywhere."""
    gen = torch.Generator().manual_seed(seed)
    start, length = [0, 3, 0, 9, 3], [3, 5, 3, 0, 5]
    tensors = {
        "input_ids": torch.randint(0, 130, (5, 60), generator=gen), "weight": _normal(gen, dtype, 130, 200),
        "prompts": _normal(gen, dtype, 20, 200), "prompt_start": torch.tensor(start, dtype=torch.int32),
        "prompt_len": torch.tensor(length, dtype=torch.int32),
        "text_start": torch.tensor([0, 2, 5, 30, 0], dtype=torch.int32),
        "text_len": torch.tensor([60, 55, 60, 41, 20], dtype=torch.int32),
    }  # fmt: skip
    settings: dict[str, Any] = {"padding_side": kind, "scale": 2.5, "out_len": 70}
    if kind == "anywhere":
        places = [torch.randperm(15, generator=gen)[:5] for _ in start]
        tensors["positions"] = torch.stack(places).int()
        settings["padding_side"] = "left"
    return Call("embed_prompts", tensors, ("weight", "prompts"), settings, 5 * 60)


def merge(kind: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """merge_states, where some parts saw nothing and hold NaN."""
    gen = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for part in "ab":
        out, lse = _normal(gen, dtype, 4, 37, 6, 80), _normal(gen, torch.float32, 4, 6, 37)
        blind = torch.rand(lse.shape, generator=gen) < 0.2
        tensors[f"out_{part}"] = out.masked_fill(blind.transpose(1, 2)[..., None], torch.nan)
        tensors[f"lse_{part}"] = lse.masked_fill(blind, -torch.inf)
    return Call("merge_states", tensors, tuple(tensors), {}, 2 * 80)


def linear(kind: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """grouped_linear, with heads of unequal width, of which some share weight rows."""
    gen = torch.Generator().manual_seed(seed)
    size = 71 if kind == "odd size" else 256
    tensors = {
        "x": _normal(gen, dtype, 6, 41, size), "weight": _normal(gen, dtype, 120, size),
        "bias": _normal(gen, dtype, 120), "start": torch.tensor([0, 50, 0, 2, 90, 50], dtype=torch.int32),
        "length": torch.tensor([30, 44, 30, 0, 10, 44], dtype=torch.int32),
    }  # fmt: skip
    return Call("grouped_linear", tensors, ("x", "weight", "bias"), {"max_out": 47}, max(size, 6 * 41))


def _normal(gen: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=gen).to(dtype)


Build = Callable[..., Call]  # of a dtype and a seed: the same shapes, other numbers
DECODING = tuple(f"paged_prefix_attention {kind}" for kind, given in _PAGED.items() if set(given["counts"]) == {1})
GRID: dict[str, Build] = {
    **{f"prefix_attention {kind}": partial(attention, kind) for kind in _KINDS},
    **{f"paged_prefix_attention {kind}": partial(paged, kind) for kind in _PAGED},
    **{f"embed_prompts {kind}": partial(embed, kind) for kind in ("left", "right", "anywhere")},
    "merge_states": partial(merge, ""),
    **{f"grouped_linear {kind}": partial(linear, kind) for kind in ("odd size", "even size")},
}
