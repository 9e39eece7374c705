"""Peers that come with torch: SDPA by backend, FlexAttention compiled, variable-length attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench import attention_baselines as baselines
from bench.attention_baselines import Entry, Form
from bench.attention_cases import Case
from bench.attention_inputs import Inputs
from bench.gpu_check import paging
from bench.gpu_check.contestants import Contestant
from bench.gpu_check.setting import Setting

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MASKS = ("cudnn", "efficient", "math")  # backends that take one


def contestants(case: Case, setting: Setting) -> Iterator[Contestant]:
    """SDPA on keys concatenated before and in the call, then the others; on a CPU its plain backend stands in."""
    backends = _BACKENDS if setting.on_gpu else {"math": SDPBackend.MATH}
    for name, backend in backends.items():
        around = partial(sdpa_kernel, [backend])
        yield Contestant(f"sdpa {name}", partial(_ready, name), around)
        yield Contestant(f"concatenation + sdpa {name}", partial(_concatenating, name), around)
    if setting.on_gpu:
        yield Contestant("flex", lambda c, x: [_flex(c)])
        yield Contestant("varlen", lambda c, x: [_varlen(c)])


def forms(case: Case, mask: Tensor | None, backend: str) -> list[Form]:
    """Ways to attend over concatenated keys that a backend may have; which of them it has, trying shows."""
    group = case.heads[0] // case.heads[1]
    width = case.prefix + case.keys
    found: list[tuple[str, Callable[..., Tensor], int]] = []
    if mask is None:
        found.append(("plain", baselines.sdpa, 0))
    elif baselines.is_plainly_causal(case):
        if backend in ("flash", "efficient"):
            bias = causal_lower_right(case.queries, width)
            found.append(("causal to the lower right", partial(baselines.sdpa, mask=bias), 0))
        found.append(("padded causal", partial(baselines.sdpa, causal=True), width - case.queries))
    if mask is not None and backend in _MASKS:
        found.append(("bool mask", partial(baselines.sdpa, mask=mask), 0))
    native = [Form(about, partial(attend, group=group), pad) for about, attend, pad in found]
    if group == 1:
        return native
    return native + [Form(f"{about}, repeated keys", attend, pad, group) for about, attend, pad in found]


def _ready(backend: str, case: Case, x: Inputs) -> list[Entry]:
    return [baselines.concatenated(case, form) for form in forms(case, x.mask, backend)]


def _concatenating(backend: str, case: Case, x: Inputs) -> list[Entry]:
    return [baselines.expanded(case, form) for form in forms(case, x.mask, backend) if form.repeats == 1]


@cache
def _flex_compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case) -> Entry:
    from torch.nn.attention.flex_attention import create_block_mask

    torch.compiler.reset()  # compiled for many cases, it would give up compiling
    after = case.prefix + case.keys - case.queries  # keys that every query sees

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + after

    def build(x: Inputs) -> baselines.Run:
        k, v = x.expanded()
        block = None
        if x.mask is not None:
            block = create_block_mask(causal, None, None, case.queries, after + case.queries, device=x.q.device.type)
        attend = _flex_compiled()
        grouped = case.heads[0] > case.heads[1]
        return baselines.run_on(
            case, lambda q, k, v: attend(q, k, v, block_mask=block, enable_gqa=grouped), (x.q, k, v),
            x.dout.transpose(1, 2),
        )  # fmt: skip

    form = Form("compiled", lambda q, k, v: q)  # no padding and no repeats: its results are named like any form's
    return Entry("torch.compile(flex_attention)", build, partial(baselines.named, case, form, case.prefix))


def _varlen(case: Case) -> Entry:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = case.causal and case.queries > 1
    more: dict[str, Any] = {}
    if "window_size" in known:
        more["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        more["is_causal"] = causal
    if "enable_gqa" in known:
        more["enable_gqa"] = case.heads[0] > case.heads[1]
    width = case.prefix + case.keys

    def build(x: Inputs) -> baselines.Run:
        k, v = x.expanded()
        q_offsets, k_offsets = (paging.offsets(case.rows, n, x.q.device) for n in (case.queries, width))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attn(q, k, v, q_offsets, k_offsets, case.queries, width, **more)

        tensors = [paging.packed(t) for t in (x.q, k, v)]
        return baselines.run_on(case, attend, tensors, x.dout.flatten(0, 1))

    return Entry("torch.nn.attention.varlen", build, partial(packed_results, case))


def packed_results(case: Case, result: Any) -> dict[str, Tensor]:
    """The output and gradients of packed tensors, laid out as the op has them."""
    if not case.backward:
        return {"out": result.view(case.rows, case.queries, *result.shape[1:])}
    out, dq, dk, dv = (t.view(case.rows, -1, *t.shape[1:]) for t in result)
    own = (t[:, case.prefix :].transpose(1, 2) for t in (dk, dv))
    return {"out": out, "dq": dq.transpose(1, 2)} | dict(zip(("dk", "dv"), own, strict=True))
