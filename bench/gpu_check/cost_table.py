"""The cost table of decoding, measured: every path over some shapes, and the weights that say best what they took.

The entry has the form of fastprompt/costs.json. The file that gpu-check writes beside its lines can be given to
FASTPROMPT_COSTS, and the entry added to the package's own file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, combinations
from typing import Any

import torch

from bench.attention_cases import Case
from bench.attention_check import truth
from bench.attention_inputs import build
from bench.gpu_check import contestants, micro, timing
from bench.gpu_check.ceilings import facts
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import Setting
from bench.measure import Spread
from fastprompt import costs, dispatch
from fastprompt.costs import Decode, Work
from fastprompt.plan import BatchPlan

_KINDS = ("launches", "unique", "again", "states")
_HELD = Decode(128, 8, 256, 512)  # the shape that the rules of sharing are made for
_ROUNDS = 9
_STATES = 3  # partial results of a row that shares: its own keys, and a prefix in two parts
_NEVER = 2**30
SHAPES = (
    Decode(8, 8, 64, 256), Decode(8, 8, 512, 1024), Decode(32, 2, 512, 128), Decode(32, 32, 64, 1024),
    Decode(64, 1, 2048, 128), Decode(64, 4, 256, 512), Decode(64, 1, 8192, 128), Decode(128, 8, 256, 512),
    Decode(128, 2, 1024, 128), Decode(128, 128, 128, 256), Decode(256, 4, 512, 256), Decode(256, 256, 32, 128),
)  # fmt: skip
QUICK = (Decode(4, 4, 16, 24, 4, 2, 64), Decode(20, 1, 512, 16, 4, 2, 64), Decode(3, 2, 16, 8, 4, 2, 64))


@dataclass(frozen=True)
class Point:
    """What one path took for one shape, in seconds."""

    path: str
    work: Work
    seconds: float


def units(setting: Setting) -> Sequence[str]:
    return ("decoding",)


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """Measures the paths that run here and writes the table; those that do not keep what is counted.

    Once there are enough shapes for one, a table after each, should there be no time for the rest; the last one counts.
    """
    rate = setting.rates.get("memory")
    points: list[Point] = []
    shapes = QUICK if setting.quick else SHAPES
    for shape in shapes:
        found = measured(shape, setting)
        points += found
        for point in found:
            emit("cost", path=point.path, shape=asdict(shape), work=asdict(point.work), seconds=point.seconds)
        fewest = min(Counter(point.path for point in points).values())
        if rate is not None and (shape is shapes[-1] or fewest > len(_KINDS)):
            emit("table", table=entry(points, rate, facts(setting.device)["name"], setting))
    if rate is None:
        emit("note", text="the copy rate was not measured, so there is no table")


def measured(shape: Decode, setting: Setting) -> list[Point]:
    """Every path, results checked before and after: recorded into a graph, inputs cold."""
    case = Case(shape.rows, shape.prompts, shape.prefix, 1, shape.own, (shape.heads, shape.kv_heads), shape.dim)
    inputs = build(case, micro.DTYPE, device=setting.device)
    right = truth(case, inputs)
    ready, works, entries = {}, {}, {}
    sets = [
        inputs,
        *(inputs.copy() for _ in range(timing.set_count(shape.work("single", False).unique, setting.device) - 1)),
    ]
    make = timing.graph if setting.on_gpu else timing.eager
    for path, (impl, share) in paths(shape, setting).items():
        entries[path] = contestants.over_pages(case, impl, share)
        works[path] = shape.work(path, share and shares(shape))
        ready[path] = make([entries[path].build(x) for x in sets], setting.device, 1e-5 if setting.quick else 1e-3)
    samples = timing.interleave(ready, 2 if setting.quick else _ROUNDS, setting.device)
    for path, entered in entries.items():
        right.errors(path, entered.named(ready[path].result()), 4.0 if setting.quick else 1.0)
    timing.release()
    return [Point(path, works[path], Spread.of([s.wall for s in samples[path]]).median) for path in ready]


def paths(shape: Decode, setting: Setting) -> dict[str, tuple[str, bool]]:
    """For each path that runs here its implementation, and whether it gets a plan that lets rows share."""
    usual = setting.chosen("paged_prefix_attention", torch.bfloat16)
    found = {"triton": (usual, True), "single": (usual, False)} if shares(shape) else {"single": (usual, False)}
    there = setting.on_gpu and setting.impl is None and dispatch.obstacle("paged_prefix_attention", "cuda") is None
    return {"cuda": ("cuda", True), **found} if there else found


def shares(shape: Decode) -> bool:
    """Whether a plan of this shape lets rows share."""
    return BatchPlan.build(*shape.extents(), queries=[1] * shape.rows).sharing is not None


def entry(points: Sequence[Point], rate: float, device: str, setting: Setting) -> dict[str, Any]:
    """A table as the file has it."""
    counted = costs.load()[0]
    weights = {path: asdict(given) for path, given in counted.paths.items()}
    taken = {path: [p for p in points if p.path == path] for path in weights}
    off = {path: fit(some, rate, weights[path]) for path, some in taken.items() if some}
    source = f"gpu-check, torch {torch.__version__}, " + "; ".join(
        f"{path}: {len(taken[path])} shapes, off by {100 * error:.0f}% at most" for path, error in off.items()
    )
    missing = [path for path in weights if path not in off]
    source += f"; {', '.join(missing)}: counted" if missing else ""
    return {
        "device": device, "measured": not setting.quick, "source": source, "memory_gbs": rate / 1e9, "paths": weights,
        "sharing": sharing(weights["cuda" if "cuda" in off else "triton"], rate),
    }  # fmt: skip


def fit(points: Sequence[Point], rate: float, weights: dict[str, float]) -> float:
    """Sets the weights, none below 0, that leave the smallest relative errors; the largest of these."""
    columns = torch.tensor([[getattr(p.work, kind) for kind in _KINDS] for p in points], dtype=torch.float64)
    columns[:, 0] /= 1e6
    columns[:, 1:] /= rate
    columns /= torch.tensor([[p.seconds] for p in points], dtype=torch.float64)
    target = torch.ones(len(points), 1, dtype=torch.float64)
    best, found = float("inf"), torch.zeros(len(_KINDS), dtype=torch.float64)
    for chosen in map(
        list, chain.from_iterable(combinations(range(len(_KINDS)), n) for n in range(1, len(_KINDS) + 1))
    ):
        solved = torch.linalg.lstsq(columns[:, chosen], target, driver="gelsd").solution[:, 0]
        error = (columns[:, chosen] @ solved - 1).square().sum().item()
        if bool((solved >= 0).all()) and error < best - 1e-12:
            best, found = error, torch.zeros_like(found).index_copy(0, torch.tensor(chosen), solved)
    weights.update(zip(("launch_us", *_KINDS[1:]), found.tolist(), strict=True))
    return (columns @ found - 1).abs().max().item()


def sharing(weights: Mapping[str, float], rate: float) -> dict[str, int]:
    """The rules of a plan that follow: what a sharing row and the merging launch cost, in tokens read once more."""
    token = 2 * _HELD.kv_heads * _HELD.dim * _HELD.itemsize * weights["again"]
    state = 2 * _HELD.heads * (_HELD.dim + 1) * 4 * weights["states"]
    launch = weights["launch_us"] * rate / 1e6
    if token <= 0:
        return {"state_tokens": _NEVER, "least_saving": _NEVER}
    return {
        "state_tokens": min(round(_STATES * state / token), _NEVER), "least_saving": min(round(launch / token), _NEVER),
    }  # fmt: skip
