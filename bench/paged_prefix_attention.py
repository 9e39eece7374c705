"""Attention over a paged own cache: ours, what an engine without such a kernel does, and the shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import attention_baselines as baselines
from bench.attention_baselines import Entry, Form, Run
from bench.attention_cases import TABLE, Case
from bench.attention_inputs import Inputs
from bench.gpu_check import paging
from fastprompt.ops import paged_prefix_attention

_DECODE = [case for case in TABLE if case.queries == 1 and case.rows > 1]
CASES = tuple(
    replace(case, paged=True, rotate=True, judged=False, targets={})
    for case in (*_DECODE, Case(8, 4, 64, 32, 128, (16, 4)))
)


def ours(case: Case, impl: str) -> Entry:
    """The op, with the plan that a step makes once for all layers."""

    def build(x: Inputs) -> Run:
        rows, _, queries, _ = x.q.shape
        pages, q = paging.paged(x), paging.packed(x.q)
        q_start = paging.offsets(rows, queries, "cpu")
        kv_len = torch.full((rows,), case.keys, dtype=torch.int32)

        def attend() -> Any:
            return paged_prefix_attention(
                q, pages.k, pages.v, pages.table, q_start, kv_len, x.prefix_k, x.prefix_v, x.start, x.length,
                plan=x.plan, impl=impl,
            )  # fmt: skip

        return attend

    def named(result: Tensor) -> dict[str, Tensor]:
        return {"out": result.view(case.rows, -1, *result.shape[1:])}

    return Entry(f"impl {impl}", build, named)


def expanded(case: Case, form: Form) -> Entry:
    """Without a paged kernel: pages gathered, prompts expanded over the rows and concatenated in front, SDPA."""
    whole = baselines.expanded(case, form)

    def build(x: Inputs) -> Run:
        pages = paging.paged(x)
        table = pages.table.long()

        def gathered(cache: Tensor) -> Tensor:
            return cache[table].flatten(1, 2)[:, : case.keys].transpose(1, 2)

        attend = baselines.expanding(case, form, x)
        return lambda: attend(gathered(pages.k), gathered(pages.v))

    return Entry(f"pages gathered, {form.about}", build, whole.named)
