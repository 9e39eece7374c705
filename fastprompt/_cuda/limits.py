"""Which calls the CUDA kernel takes, found out from shapes, strides and the plan alone: nothing is loaded for it."""

from __future__ import annotations

import torch

from fastprompt.arguments import PagedPrefixAttention
from fastprompt.plan import BatchPlan

HEAD_DIMS = (64, 96, 128, 256)
MOST_SHARED_HEADS = 16  # query heads of a key-value head
_VECTOR = 8  # elements of the 16 bytes that are loaded at once


def problem(call: PagedPrefixAttention, plan: BatchPlan | None) -> str | None:
    """Why the kernel does not take a call, or None."""
    tokens, heads, dim = call.q.shape
    kv_heads, dim_v = call.v_cache.shape[2:]
    if plan is None:
        return "it needs a plan built with queries, which says that every row has one query"
    if plan.decoding is None or tokens != call.kv_len.shape[0]:
        return "it takes rows of one query only, and not every row has one by its plan"
    if dim not in HEAD_DIMS or dim_v != dim:
        return f"its heads have {dim} and {dim_v} numbers, expected the same for both, one of {_listed(HEAD_DIMS)}"
    if heads > MOST_SHARED_HEADS * kv_heads:
        return f"{heads // kv_heads} query heads share a key-value head, expected at most {MOST_SHARED_HEADS}"
    for name in ("q", "k_cache", "v_cache", "prefix_k", "prefix_v"):
        x = getattr(call, name)
        # a compiler cannot read where a tensor begins; there the kernel itself refuses what lies between vectors
        begin = 0 if torch.compiler.is_compiling() else x.storage_offset()
        for step in (begin, *x.stride()[:-1]):
            if step % _VECTOR:
                return (
                    f"{name} begins at element {begin} and has strides {list(x.stride())}, expected multiples of "
                    f"{_VECTOR} but in the last dimension"
                )
    return None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
