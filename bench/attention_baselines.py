"""What prefix attention is compared to: every correct way to write it with torch's own attention, and ours itself.

An `Entry` builds runs; whatever a run needs that its method may have made before the call (concatenated keys, masks,
repeated keys, padded queries) is made when the run is built, outside of any timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention_cases import Case
from bench.attention_inputs import Inputs
from fastprompt.ops import prefix_attention
from fastprompt.plan import BatchPlan

Run = Callable[[], Any]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")


@dataclass(frozen=True)
class Entry:
    """A contestant: `build` makes a run on some inputs, `named` brings its result into the op's layout."""

    about: str
    build: Callable[[Any], Run]
    named: Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """One way to attend over concatenated keys: `attend(q, k, v) -> [B, Hq, N, D]` on what `queries`, `keys` made."""

    about: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    pad: int = 0  # zero queries in front
    repeats: int = 1  # times each key-value head stands
    sdpa: bool = True

    def queries(self, q: Tensor) -> Tensor:
        return F.pad(q, (0, 0, self.pad, 0)) if self.pad else q

    def keys(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.repeats, 1) if self.repeats > 1 else x

    def trim(self, x: Tensor) -> Tensor:
        return x[:, :, self.pad :]


def ours(case: Case, impl: str) -> Entry:
    """The op, reading prefixes where they lie, with the plan that a step makes once for all layers."""

    def build(x: Inputs) -> Run:
        def attend(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Any:
            return prefix_attention(
                q, k, v, prefix_k, prefix_v, x.start, x.length,
                causal=case.causal, window=case.window, kv_start=x.first, plan=x.plan, impl=impl,
            )  # fmt: skip

        return run_on(case, attend, (x.q, x.k, x.v, x.prefix_k, x.prefix_v), x.dout)

    def named(result: Any) -> dict[str, Tensor]:
        return dict(zip(("out", *_GRADIENTS), result, strict=True)) if case.backward else {"out": result}

    return Entry(f"impl {impl}", build, named)


def forms(case: Case, mask: Tensor | None, dtype: torch.dtype) -> list[Form]:
    """All correct forms of torch's attention for a mask `[B or 1, 1, N, P + S]` over concatenated keys."""
    group = case.heads[0] // case.heads[1]
    added = None if mask is None else _additive(mask, dtype)
    masks = {"plain": None} if mask is None else {"bool mask": mask, "float mask": added}
    found = []
    for about, each in masks.items():
        found.append(Form(about, partial(sdpa, mask=each, group=group)))
        if group > 1:
            found.append(Form(f"{about}, repeated keys", partial(sdpa, mask=each), repeats=group))
    if is_plainly_causal(case):
        pad = case.prefix + case.keys - case.queries
        found.append(Form("padded causal", partial(sdpa, causal=True, group=group), pad))
        if group > 1:
            found.append(Form("padded causal, repeated keys", partial(sdpa, causal=True), pad, group))
    folded = None if added is None else added.repeat(1, 1, group, 1)  # a group's heads are query rows
    if group > 1:
        found.append(Form("heads folded", partial(_folded, mask=folded)))
    found.append(Form("bmm, softmax, bmm", partial(_bmm, mask=folded), sdpa=False))
    return found


def concatenated(case: Case, form: Form) -> Entry:
    """A form on keys and values that are concatenated already."""

    def build(x: Inputs) -> Run:
        k, v = x.expanded()
        return run_on(case, form.attend, (form.queries(x.q), form.keys(k), form.keys(v)), _dout(x, form))

    return Entry(form.about, build, partial(named, case, form, case.prefix))


def expanded(case: Case, form: Form) -> Entry:
    """PEFT's way: the prompts, stored apart, are expanded over the rows and concatenated in front in every call."""

    def build(x: Inputs) -> Run:
        attend = _expand_and_attend(case, form, x)
        banks = (_bank(case, x.prefix_k), _bank(case, x.prefix_v))
        return run_on(case, attend, (form.queries(x.q), x.k, x.v, *banks), _dout(x, form))

    return Entry(form.about, build, partial(named, case, form, 0))


def expanding(case: Case, form: Form, x: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    """What `expanded` does in a call, on own keys and values that come only then."""
    attend, q = _expand_and_attend(case, form, x), form.queries(x.q)
    banks = (_bank(case, x.prefix_k), _bank(case, x.prefix_v))
    return lambda k, v: attend(q, k, v, *banks)


def single_pass(case: Case, impl: str) -> Entry:
    """The op where it reads no prompt for several rows: the rows of a prompt take turns at two copies of it.

    The plan has them in the same order and each as a group of its own, so that no two neighbours read one copy.
    """
    together = ours(case, impl)

    def build(x: Inputs) -> Run:
        order = x.plan.order.long()
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(case.rows))
        sharers = x.start[order, None] == x.start[order]
        odd = sharers.tril(-1).sum(1)[rank].int() % 2  # how many rows of its prompt stand before a row
        twice = [torch.cat([arena, arena], 1) for arena in (x.prefix_k, x.prefix_v)]
        plan = BatchPlan.build(rank.int(), torch.ones_like(x.length))
        start = x.start + odd * x.prefix_k.shape[1]
        return together.build(replace(x, prefix_k=twice[0], prefix_v=twice[1], start=start, plan=plan))

    return Entry(f"impl {impl}, every row alone", build, together.named)


def folded(case: Case, inputs: Inputs) -> Entry | None:
    """Rows of one prompt and heads of one group as rows of one product; None where that does not serve."""
    own = None if inputs.mask is None else inputs.mask[..., case.prefix :]
    if not case.few or not case.prefix or case.window or case.backward or (own is not None and not own.any(-1).all()):
        return None
    group = case.heads[0] // case.heads[1]
    added = None if own is None or own.all() else _additive(own, inputs.q.dtype).repeat(1, 1, group, 1)

    def build(x: Inputs) -> Run:
        return partial(_attend_folded, x, _groups(case, x), added)

    return Entry("prompts folded", build, lambda out: {"out": out.transpose(1, 2)})


def run_on(case: Case, attend: Callable[..., Tensor], tensors: Sequence[Tensor], dout: Tensor) -> Run:
    """`attend` on the tensors, for training with the gradients of all of them."""
    if not case.backward:
        return partial(attend, *tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return run


def _dout(x: Inputs, form: Form) -> Tensor:
    return form.queries(x.dout.transpose(1, 2))


def named(case: Case, form: Form, before: int, result: Any) -> dict[str, Tensor]:
    """The output, and those gradients of own tensors that are not summed over anything else; they begin at `before`."""
    if not case.backward:
        return {"out": form.trim(result).transpose(1, 2)}
    out, dq, dk, dv, *_ = result
    named = {"out": form.trim(out).transpose(1, 2), "dq": form.trim(dq)}
    return named if form.repeats > 1 else named | {"dk": dk[:, :, before:], "dv": dv[:, :, before:]}


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def is_plainly_causal(case: Case) -> bool:
    """Whether a query sees all that stands before it and nothing else."""
    return case.causal and case.queries > 1 and not (case.window or case.padded or case.ragged)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, group: int = 1) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=group > 1)


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hkv, G*N, D]
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def _bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    logits = torch.matmul(rows, k.mT).mul_(q.shape[3] ** -0.5)
    logits = logits if mask is None else logits.add_(mask)
    return torch.matmul(logits.softmax(-1), v).reshape(q.shape)


def _expand_and_attend(case: Case, form: Form, x: Inputs) -> Callable[..., Tensor]:
    rows = torch.tensor(case.prompt_of(), device=x.q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, bank_k: Tensor, bank_v: Tensor) -> Tensor:
        k, v = (torch.cat([_of_rows(bank, rows), own], 2) for bank, own in ((bank_k, k), (bank_v, v)))
        return form.attend(q, k, v)

    return attend


def _bank(case: Case, arena: Tensor) -> Tensor:
    """The prompts as `[T, Hkv, P, D]`, shorter ones filled up with zeros."""
    parts = arena.split(case.lengths(), 1)
    return torch.stack([F.pad(part, (0, 0, 0, case.prefix - part.shape[1])) for part in parts])


def _of_rows(bank: Tensor, rows: Tensor) -> Tensor:
    """Each row's prompt; the only one there is needs no copy before the concatenation copies it."""
    return bank.expand(len(rows), -1, -1, -1) if bank.shape[0] == 1 else bank.index_select(0, rows)


@dataclass(frozen=True)
class _Group:
    """Prompts `k`, `v` `[T, Hkv, P, D]` that as many rows read each, in order; `rows` None for all as they stand."""

    rows: Tensor | None
    k: Tensor
    v: Tensor


def _groups(case: Case, x: Inputs) -> list[_Group]:
    """One group where all prompts are alike, so that one call serves them all; else one a prompt."""
    prompts = case.prompt_of()
    order = sorted(range(case.rows), key=prompts.__getitem__)
    counts = [prompts.count(t) for t in range(case.prompts)]
    if not case.ragged and len(set(counts)) == 1:
        k, v = (a.unflatten(1, (case.prompts, -1)).transpose(0, 1) for a in (x.prefix_k, x.prefix_v))
        return [_Group(None if order == list(range(case.rows)) else torch.tensor(order), k, v)]
    parts = zip(*(a.split(case.lengths(), 1) for a in (x.prefix_k, x.prefix_v)), strict=True)
    rows = torch.tensor(order).split(counts)
    return [_Group(r, k[None], v[None]) for r, (k, v) in zip(rows, parts, strict=True) if len(r)]


def _attend_folded(x: Inputs, groups: list[_Group], mask: Tensor | None) -> Tensor:
    """`[B, Hq, N, D]`: one call over the own keys, one a group over its prompts, merged by lse."""
    shape = rows, heads, queries, dim = x.q.shape
    kv_heads = x.k.shape[1]
    own, own_lse = _flash(x.q.reshape(rows, kv_heads, -1, dim), x.k, x.v, attn_mask=mask)
    out, lse = own.reshape(shape), own_lse.reshape(shape[:3])
    prefix_out, prefix_lse = torch.empty_like(out), torch.empty_like(lse)
    for group in groups:
        q = x.q if group.rows is None else x.q[group.rows]
        each = (q.shape[0] // group.k.shape[0], heads // kv_heads, queries)
        q = q.unflatten(0, (-1, each[0])).unflatten(2, (kv_heads, -1)).transpose(1, 2)  # [T, Hkv, rows, G, N, D]
        part, part_lse = _flash(q.flatten(2, 4), group.k, group.v)
        part = part.unflatten(2, each).transpose(1, 2).reshape(-1, *shape[1:])
        part_lse = part_lse.unflatten(2, each).transpose(1, 2).reshape(-1, *shape[1:3])
        if group.rows is None:
            prefix_out, prefix_lse = part, part_lse
        else:
            prefix_out[group.rows], prefix_lse[group.rows] = part, part_lse
    return torch.lerp(out, prefix_out, torch.sigmoid(prefix_lse - lse)[..., None].to(out.dtype))
