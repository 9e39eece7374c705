"""Batches of decode rows for the CUDA kernels, and what must come out of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from cpu_cases import assert_within, bounds, plain
from cuda_machine import SHARERS, Copies, Loads, Machine, arguments, chip
from torch import Tensor

from fastprompt import reference

NAN = float("nan")
SMALL = chip(90, 2)  # few multiprocessors, so that blocks take many items in turn


@dataclass(frozen=True)
class Batch:
    """Arguments of a call as the op takes them; `scales` are those of an e4m3 prefix, `sharing` is a plan's."""

    tensors: tuple[Tensor, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    scales: tuple[Tensor, Tensor] | None = None
    sharing: Tensor | None = None

    def oracle(self, function: Any = None) -> dict[str, Tensor]:
        """In float64, or as `function` has it; rows without a single query hold NaN."""
        args = list(self.tensors)
        if self.scales is not None:
            for at, scale in zip((6, 7), self.scales, strict=True):
                args[at] = (args[at].float() * scale[:, None, None]).to(
                    torch.float64 if function is None else args[0].dtype
                )
        settings = dict(self.settings)
        if function is None:
            args = [x.double() if x.is_floating_point() else x for x in args]
            settings = {n: x.double() if isinstance(x, Tensor) else x for n, x in settings.items()}
            out, lse = reference.paged_prefix_attention(*args, return_lse=True, **settings)
        else:
            out, lse = function(reference.paged_prefix_attention, *args, return_lse=True, **settings)
        out, lse = out.clone(), lse.clone()
        for first, end in zip(args[4].tolist(), args[4].tolist()[1:], strict=False):
            if end - first != 1:
                out[first:end], lse[:, first:end] = NAN, NAN
        return {"out": out, "lse": lse}


def share(groups: list[list[int]], rows: int, room: int) -> Tensor:
    """A plan's sharing in which these rows read together, of a capacity for `rows` rows and `room` tiles."""
    capacity = max(rows, 4 * room)
    lists = torch.full((capacity + capacity // 4 * SHARERS,), -1, dtype=torch.int32)
    for i, group in enumerate(groups):
        lists[torch.tensor(group)] = i
        lists[capacity + i * SHARERS :][: len(group)] = torch.tensor(group, dtype=torch.int32)
    return lists


def batch(
    extents: list[tuple[int, int]],
    lens: list[int],
    *,
    counts: list[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    size: int = 16,
    tokens: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    e4m3: bool = False,
    seed: int = 0,
    together: list[list[int]] | None = None,
    room: int = 0,
    columns: int = 0,
    heads_first: bool = False,
    **settings: Any,
) -> Batch:
    """Rows of these extents and own lengths in shuffled pages; whatever nobody may read holds NaN."""
    gen = torch.Generator().manual_seed(seed)
    (hq, hkv), rows = heads, len(lens)
    counts = [1] * rows if counts is None else counts
    pages = [-(-n // size) for n in lens]
    table = torch.full((rows, max([*pages, columns - 1]) + 1), 10**6, dtype=torch.int32)
    shuffled = torch.randperm(sum(pages) + 2, generator=gen).tolist()
    shape = (sum(pages) + 2, hkv, size, dim) if heads_first else (sum(pages) + 2, size, hkv, dim)
    caches = [torch.full(shape, NAN).to(dtype) for _ in range(2)]
    caches = [c.transpose(1, 2) if heads_first else c for c in caches]
    for b, count in enumerate(pages):
        table[b, :count] = torch.tensor([shuffled.pop() for _ in range(count)], dtype=torch.int32)
        for i in range(count):
            used = min(size, lens[b] - i * size)
            for cache in caches:
                cache[table[b, i], :used] = torch.randn(used, hkv, dim, generator=gen).to(dtype)
    arenas = [torch.full((hkv, tokens, dim), NAN) for _ in range(2)]
    for start, length in extents:
        for arena in arenas:
            arena[:, start : start + length] = torch.randn(hkv, length, dim, generator=gen) if length else 0.0
    scales = None
    if e4m3:
        scales = tuple(torch.rand(hkv, generator=gen) * 0.02 + 0.005 for _ in range(2))
        arenas = [(x / s[:, None, None]).clamp(-448, 448) for x, s in zip(arenas, scales, strict=True)]
    arenas = [x.to(torch.float8_e4m3fn if e4m3 else dtype) for x in arenas]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(counts), hq, dim, generator=gen).to(dtype)
    start, length = (torch.tensor(v, dtype=torch.int32) for v in zip(*extents, strict=True))
    lens_tensor = torch.tensor(lens, dtype=torch.int32)
    tensors = (q, *caches, table, starts, lens_tensor, *arenas, start, length)
    sharing = None if together is None else share(together, rows, max(room, len(together)))
    return Batch(tensors, settings, scales, sharing)


def settings(heads: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every kind of setting once."""
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(5))
    return [
        {},
        {"window": 20},
        {"softcap": 3.0, "scale": 0.4},
        {"sinks": sinks},
        {"sinks": sinks.to(dtype), "e4m3": True},
        {"window": 1, "sinks": sinks.to(dtype)},
    ]


def random_case(random: Random) -> tuple[Batch, dict[str, Any]]:
    """A batch with any settings, and how it is run."""
    kv_heads, group = random.choice([1, 2]), random.choice([1, 2, 3, 4, 5, 7, 8, 16])
    dtype, rows = random.choice([torch.bfloat16, torch.float16]), random.randint(1, 20)
    prompts = [(0, random.choice([1, 17, 60, 300])), (310, random.choice([5, 64, 70])), (0, 0)]
    extents = random.choices(prompts, k=rows)
    counts = random.choices([0, 1, 1, 1, 1, 2] if random.random() < 0.3 else [1], k=rows)
    lens = [max(n, random.choice([0, 1, 3, 17, 64, 65, 130])) for n in counts]
    groups = [[r for r in range(rows) if extents[r] == p and p[1] and counts[r] == 1] for p in prompts]
    tiles = [g[i : i + SHARERS] for g in groups if len(g) > 1 for i in range(0, len(g), SHARERS)]
    possible = {
        "window": random.choice([1, 9, 70, 200]),
        "softcap": random.choice([2.0, 20.0]),
        "sinks": torch.randn(kv_heads * group).to(random.choice([dtype, torch.float32])),
        "scale": 0.3,
    }
    b = batch(
        extents, lens, counts=counts, heads=(kv_heads * group, kv_heads), dim=random.choice([64, 96, 128, 256]),
        size=random.choice([1, 3, 16, 32]), tokens=400, dtype=dtype, e4m3=random.random() < 0.3,
        seed=random.randint(0, 10**6), together=tiles if random.random() < 0.6 else None, room=len(tiles) + 3,
        heads_first=random.random() < 0.3, **{n: x for n, x in possible.items() if random.random() < 0.25},
    )  # fmt: skip
    capability = random.choice([80, 89, 90])
    loads = random.choice([Loads.ASYNC, Loads.BULK]) if capability == 90 else Loads.AUTO
    on = chip(capability, random.choice([1, 2, 8, 40]))
    return b, {"on": on, "copies": random.choice(list(Copies)), "seed": random.randint(0, 10**6), "loads": loads}


def run(
    machine: Machine,
    b: Batch,
    *,
    on: Any = SMALL,
    copies: Copies = Copies.RANDOM,
    seed: int = 0,
    loads: Loads = Loads.AUTO,
    whole_rows: bool = False,
) -> tuple[dict[str, Tensor], Any]:
    """Results of the kernels on the host machine, NaN where they wrote none, and the schedule."""
    q = b.tensors[0]
    out = torch.full((q.shape[0], q.shape[1], q.shape[2]), NAN, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), NAN)
    tensors = [*b.tensors[:4], None if whole_rows else b.tensors[4], *b.tensors[5:]]
    a = arguments(*tensors, out, lse, sharing=b.sharing, prefix_scales=b.scales, loads=loads, **b.settings)
    schedule = machine.schedule(a, on)
    assert not isinstance(schedule, int), f"refused with {schedule}"
    machine.run(a, schedule, copies, seed)
    return {"out": out, "lse": lse}, schedule


def check(machine: Machine, b: Batch, **more: Any) -> Any:
    """The kernels' results against the oracle's, within the bound that plain PyTorch's error gives; the schedule."""
    got, schedule = run(machine, b, **more)
    exact, usual = b.oracle(), b.oracle(plain)
    q, lens = b.tensors[0], b.tensors[5].clamp(min=0) + b.tensors[9]
    assert torch.equal(got["out"].isnan(), exact["out"].isnan()), "rows that are not this kernel's"
    assert torch.equal(got["lse"].isnan(), exact["lse"].isnan())
    got, exact, usual = ({n: x.nan_to_num(7.0, neginf=-torch.inf) for n, x in r.items()} for r in (got, exact, usual))
    allowed = bounds(exact, usual, q.dtype, 2 * q.shape[2] + int(lens.max()))
    assert_within(got, exact, allowed, q.dtype)
    return schedule
