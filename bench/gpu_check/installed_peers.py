"""Peers that take part where they are installed: flash-attn 2 and 3, FlashInfer by row and as a cascade."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench import attention_baselines as baselines
from bench.attention_baselines import Entry
from bench.attention_cases import Case
from bench.attention_inputs import Inputs
from bench.gpu_check import paging
from bench.gpu_check.contestants import Contestant, unpacked
from bench.gpu_check.torch_peers import packed_results

_WORKSPACE = 256 << 20  # bytes FlashInfer is given for partial results


def contestants(case: Case) -> Iterator[Contestant]:
    """All that can do the case, those with an obstacle that are not installed."""
    if not case.padded and not case.ragged and case.window is None:
        for name, module in (("flash-attn", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
            yield Contestant(name, lambda c, x, m=module: [_flash(c, m)], obstacle=_missing(module))
    if paging.whole_pages(case) and not case.backward and case.window is None:
        missing = _missing("flashinfer")
        if case.queries == 1:
            yield Contestant("flashinfer by row", lambda c, x: [_by_row(c)], obstacle=missing)
        yield Contestant("flashinfer cascade", lambda c, x: [_cascade(c)], obstacle=missing)


def _missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def _flash(case: Case, module: str) -> Entry:
    """flash-attn on concatenated keys; its causal mask is aligned to the lower right."""
    library = importlib.import_module(module)
    causal = case.causal and case.queries > 1
    width = case.prefix + case.keys

    def build(x: Inputs) -> baselines.Run:
        k, v = (t.transpose(1, 2).contiguous() for t in x.expanded())
        q = x.q.transpose(1, 2).contiguous()
        if case.queries == 1 and not case.backward:
            used = torch.full((case.rows,), width, dtype=torch.int32, device=q.device)
            run = partial(library.flash_attn_with_kvcache, q, k, v, cache_seqlens=used, causal=False)
            return lambda: _first(run())
        return baselines.run_on(
            case, lambda q, k, v: _first(library.flash_attn_func(q, k, v, causal=causal)), (q, k, v), x.dout
        )

    def named(result: Any) -> dict[str, Tensor]:
        flat = [t.flatten(0, 1) for t in (result if case.backward else (result,))]
        return packed_results(case, flat if case.backward else flat[0])

    return Entry(module, build, named)


def _first(result: Any) -> Tensor:
    """The output, where a version returns more beside it."""
    return result[0] if isinstance(result, tuple) else result


@cache
def _workspace(device: str) -> Tensor:
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)


def _pool(case: Case, x: Inputs) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Caches with the prompts' pages before all others, each prompt's pages, and each row's own."""
    each = case.prefix // paging.SIZE
    pages = paging.paged(x, spare=case.prompts * each)
    for cache_, arena in ((pages.k, x.prefix_k), (pages.v, x.prefix_v)):
        cache_[: case.prompts * each] = arena.transpose(0, 1).reshape(-1, paging.SIZE, *cache_.shape[2:])
        cache_.nan_to_num_()  # slots behind a row's last token are masked there, but must be numbers
    prompts = torch.arange(case.prompts * each, dtype=torch.int32, device=x.q.device).view(case.prompts, each)
    return (pages.k, pages.v), prompts, pages.table


def _last_page(tokens: int, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), (tokens - 1) % paging.SIZE + 1, dtype=torch.int32, device=device)


def _by_row(case: Case) -> Entry:
    """Paged decoding in which each row's pages begin with those of its prompt."""
    flashinfer = importlib.import_module("flashinfer")

    def build(x: Inputs) -> baselines.Run:
        caches, prompts, own = _pool(case, x)
        device = x.q.device
        rows = torch.tensor(case.prompt_of(), device=device)
        table = torch.cat([prompts[rows], own], 1)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(str(device)), "NHD", use_tensor_cores=case.heads[0] > case.heads[1]
        )
        wrapper.plan(
            paging.offsets(case.rows, table.shape[1], device), table.flatten().contiguous(),
            _last_page(case.keys, case.rows, device), *case.heads, case.dim, paging.SIZE,
            q_data_type=x.q.dtype, kv_data_type=x.q.dtype,
        )  # fmt: skip
        return partial(wrapper.run, paging.packed(x.q), caches)

    return Entry("flashinfer.BatchDecodeWithPagedKVCacheWrapper", build, partial(unpacked, case))


def _cascade(case: Case) -> Entry:
    """Two levels: the prompts, each with its rows beside each other, and the rows' own pages."""
    flashinfer = importlib.import_module("flashinfer")
    prompt_of = case.prompt_of()
    order = sorted(range(case.rows), key=prompt_of.__getitem__)
    counts = torch.tensor([0, *(prompt_of.count(t) * case.queries for t in range(case.prompts))])

    def build(x: Inputs) -> baselines.Run:
        caches, prompts, own = _pool(case, x)
        device = x.q.device
        rows = torch.tensor(order, device=device)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(str(device)), "NHD")
        own = own[rows]
        wrapper.plan(
            [counts.cumsum(0).int().to(device), paging.offsets(case.rows, case.queries, device)],
            [paging.offsets(n, table.shape[1], device) for n, table in ((case.prompts, prompts), (case.rows, own))],
            [prompts.flatten().contiguous(), own.flatten().contiguous()],
            [_last_page(n, k, device) for n, k in ((case.prefix, case.prompts), (case.keys, case.rows))],
            *case.heads, case.dim, paging.SIZE, causal=case.causal and case.queries > 1,
            q_data_type=x.q.dtype, kv_data_type=x.q.dtype,
        )  # fmt: skip
        return partial(wrapper.run, paging.packed(x.q[rows]), caches)

    def named(out: Any) -> dict[str, Tensor]:
        there = torch.empty_like(out).view(case.rows, case.queries, *out.shape[1:])
        there[torch.tensor(order, device=out.device)] = out.view(there.shape)
        return {"out": there}

    return Entry("flashinfer.MultiLevelCascadeAttentionWrapper, rows sorted", build, named)
