"""Who takes part in a timed case: ours, and every peer that is installed, each by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from bench import attention_baselines as baselines
from bench.attention_baselines import Entry
from bench.attention_cases import Case
from bench.attention_inputs import Inputs
from bench.gpu_check import paging
from bench.gpu_check.cases import PAGED
from bench.gpu_check.setting import OURS, Setting
from bench.measure import Sample
from fastprompt.ops import paged_prefix_attention
from fastprompt.plan import BatchPlan


@dataclass(frozen=True)
class Contestant:
    """Its correct forms, of which the quickest is timed, made when it is its turn; `around` holds while it runs.

    `ours`: what the ops choose by themselves, which must be right; any other may fail alone.
    """

    name: str
    forms: Callable[[Case, Inputs], list[Entry]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ours: bool = False
    obstacle: str | None = None


@dataclass
class Entered:
    """A contestant that was right: its quickest form, how many sets of inputs it takes turns on, what was timed."""

    who: Contestant
    entry: Entry
    sets: int
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)  # by launch and buffers


def all_of(case: Case, setting: Setting) -> Iterator[Contestant]:
    """Ours first."""
    from bench.gpu_check import installed_peers, torch_peers

    yield from ours(case, setting)
    yield from torch_peers.contestants(case, setting)
    if setting.on_gpu:
        yield from installed_peers.contestants(case)


def ours(case: Case, setting: Setting) -> Iterator[Contestant]:
    """The op as it chooses, its further implementations, and where a query is all there is the op over pages."""
    dtype = torch.bfloat16
    for i, impl in enumerate(setting.impls("prefix_attention", dtype)):
        yield Contestant(_named(OURS, impl, i), lambda c, _, m=impl: [baselines.ours(c, m)], ours=i == 0)
    if case.queries == 1 and not case.backward:
        yield from _paged(setting, dtype)


def _paged(setting: Setting, dtype: torch.dtype) -> Iterator[Contestant]:
    """The op over pages as it chooses, as each implementation, and with a plan in which nobody shares."""
    yield Contestant(PAGED, lambda c, _: [over_pages(c, setting.impl, True)], ours=True)
    impls = setting.impls("paged_prefix_attention", dtype)
    for impl in impls if setting.on_gpu and setting.impl is None else ():
        yield Contestant(f"{PAGED}, {impl}", lambda c, _, m=impl: [over_pages(c, m, True)])
    yield Contestant(f"{PAGED}, nobody shares", lambda c, _: [over_pages(c, impls[0], False)], ours=True)


def _named(name: str, impl: str, place: int) -> str:
    return name if place == 0 else f"{name}, {impl}"


def over_pages(case: Case, impl: str | None, share: bool) -> Entry:
    """Over a paged cache; `share`: with a plan that says which rows read their prompt together, where that pays."""

    def build(x: Inputs) -> baselines.Run:
        pages = paging.paged(x)
        device = x.q.device
        kv_len = torch.full((case.rows,), case.keys, dtype=torch.int32, device=device)
        q_start = paging.offsets(case.rows, case.queries, device)
        queries = [case.queries] * case.rows if share else None
        lengths, prompts = case.lengths(), case.prompt_of()
        starts = [0, *accumulate(lengths)]
        plan = BatchPlan.build(
            [starts[t] for t in prompts], [lengths[t] for t in prompts], queries=queries, device=device
        )
        return partial(
            paged_prefix_attention, paging.packed(x.q), pages.k, pages.v, pages.table, q_start, kv_len,
            x.prefix_k, x.prefix_v, x.start, x.length, plan=plan, impl=impl,
        )  # fmt: skip

    return Entry(f"paged_prefix_attention, impl {impl or 'as the op chooses'}", build, partial(unpacked, case))


def unpacked(case: Case, out: Any) -> dict[str, torch.Tensor]:
    """`[B * N, Hq, D]` as the op lays results out."""
    return {"out": out.view(case.rows, case.queries, *out.shape[1:])}
