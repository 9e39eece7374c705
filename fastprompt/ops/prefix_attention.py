"""Attention of each row to its own prefix, read in place, and to its own keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt.arguments import PrefixAttention, schema
from fastprompt.ops import _checks
from fastprompt.ops._library import define, differentiate, straight, unobserved
from fastprompt.plan import BatchPlan


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_start: Tensor,
    prefix_len: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    q_start: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    plan: BatchPlan | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every row over its prefix and its own keys in one softmax.

    Semantics, for row b and query i::

        keys   = prefix_k[:, start : start + len], then k[b, :, max(kv_start, 0) : kv_len]
        qi     = q_start[b] + i                                  # own index of the query
        logit  = softcap_(scale * q . key) + bias                # softcap_(x) = softcap * tanh(x / softcap)
        seen   = own keys j <= qi if causal, the prefix always
        seen  &= position(q) - position(key) < window            # its absolute value unless causal
        out, lse = softmax(logits seen, and sinks[h] without a value)

    where own index j has position len + j - kv_start and prefix token p has position p. A negative `kv_start` says
    that so many older own keys were dropped: positions count them still. A query that sees nothing, or only biases of
    -inf, gives 0 and -inf.

    Shapes: `q [B, Hq, N, D]`, `k [B, Hkv, S, D]`, `v [B, Hkv, S, Dv]`, one layer of an arena `prefix_k [Hkv, T, D]`,
    `prefix_v [Hkv, T, Dv]`, int32 or int64 `[B]` for `prefix_start`, `prefix_len`, `kv_start` (default 0), `kv_len`
    (default S), `q_start` (default S - N); `sinks [Hq]`, `bias [B|1, Hq|1, N|1, S]`,
    `prefix_bias [B|1, Hq|1, N|1, P]` with P >= the longest prefix.
    Any strides with a contiguous last dimension; float32, bfloat16, float16 or float64.
    `scale` defaults to D**-0.5. `plan` groups the rows by prompt and is made here when None.
    Returns `out [B, N, Hq, Dv]` in the dtype of q and, with `return_lse`, the natural-log `lse [B, Hq, N]` in float32
    (float64 for float64), both contiguous. Gradients of all floating point inputs, those of a prefix summed over the
    rows that read it, equal to the last bit on every run.
    Raises `ArgumentError` for what does not fit and `ImplementationError` for an `impl` that cannot run.
    Source: prefixes as in Li and Liang 2021, section 4; merging by lse as in FlashAttention, Dao et al. 2022.
    """
    _checks.window(window)
    _checks.positive("softcap", softcap)
    call = PrefixAttention(
        q, k, v, prefix_k, prefix_v, prefix_start, prefix_len, sinks, bias, prefix_bias, kv_start, kv_len, q_start,
        causal, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap,
    )  # fmt: skip
    chosen = dispatch.choose("prefix_attention", impl, q.device, q.dtype)
    chosen = dispatch.fitting_heads("prefix_attention", impl, chosen, q, v)
    need_grad = _checks.needs_grad(q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias)
    if chosen == "cpu" and not need_grad and unobserved(call[:_TENSORS]):
        packed = _checks.plan(plan, prefix_len, chosen)
        out, lse = straight("prefix_attention", chosen, partial(_check, call), call, packed, return_lse)
    else:
        _check(call)
        packed = _checks.plan(plan, prefix_len, chosen)
        out, lse = torch.ops.fastprompt.prefix_attention.default(*call, packed, need_grad or return_lse, chosen)
    return (out, lse) if return_lse else out


def _check(call: PrefixAttention) -> None:
    q, k, v = call.q, call.k, call.v
    _checks.shape("q", q, (None,) * 4, "[B, Hq, N, D]")
    rows, heads, _, dim = q.shape
    _checks.shape("k", k, (rows, None, None, dim), "[B, Hkv, S, D]")
    _, kv_heads, size, _ = k.shape
    _checks.shape("v", v, (rows, kv_heads, size, None), "[B, Hkv, S, Dv]")
    _checks.shape("prefix_k", call.prefix_k, (kv_heads, None, dim), "[Hkv, T, D]")
    _checks.shape("prefix_v", call.prefix_v, (kv_heads, call.prefix_k.shape[1], v.shape[3]), "[Hkv, T, Dv]")
    _checks.heads(heads, kv_heads)
    _checks.floats({"q": q, "k": k, "v": v, "prefix_k": call.prefix_k, "prefix_v": call.prefix_v})
    for name in ("prefix_start", "prefix_len", "kv_start", "kv_len", "q_start"):
        _checks.index(name, getattr(call, name), (rows,), "[B]", q)
    _checks.sinks(call.sinks, heads, q)
    _checks.bias("bias", call.bias, q, size, "[B|1, Hq|1, N|1, S]")
    _checks.bias("prefix_bias", call.prefix_bias, q, None, "[B|1, Hq|1, N|1, P]")


_ARGUMENTS = schema(PrefixAttention)
_TENSORS = _ARGUMENTS.count("Tensor")  # which come first
_INPUTS = (0, 1, 2, 3, 4, 7, 8, 9)  # which of them have gradients


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    return dispatch.kernels("prefix_attention", args[-1]).forward(PrefixAttention._make(args[:-3]), *args[-3:-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, v, need_lse = args[0], args[2], args[-2]
    rows, heads, queries, _ = q.shape
    lse = (rows, heads, queries) if need_lse else (0,)
    return q.new_empty(rows, queries, heads, v.shape[3]), q.new_empty(lse, dtype=_lse_dtype(q))


def _run_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    kernels = dispatch.kernels("prefix_attention", args[-1])
    return kernels.backward(dout, dlse, out, lse, PrefixAttention._make(args[:-3]), *args[-3:-1])


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, wanted = [args[i] for i in _INPUTS], args[-2]
    return tuple(
        torch.empty_like(x) if w and x is not None else dout.new_empty(0) for x, w in zip(inputs, wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *ctx.numbers, plan, _, ctx.impl = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, plan, *inputs[:_TENSORS])


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, plan, *tensors = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in _INPUTS]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dout is None and dlse is None:
        return tuple(grads)
    dout = torch.zeros_like(out) if dout is None else dout
    results = torch.ops.fastprompt.prefix_attention_backward.default(
        dout, dlse, out, lse, *tensors, *ctx.numbers, plan, wanted, ctx.impl
    )
    for i, want, grad in zip(_INPUTS, wanted, results, strict=True):
        grads[i] = grad if want else None
    return tuple(grads)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


define(f"prefix_attention({_ARGUMENTS}, Tensor? plan, bool need_lse, str impl) -> (Tensor, Tensor)", _run, _fake)
define(
    f"prefix_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}, Tensor? plan, "
    "bool[] wanted, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
differentiate("prefix_attention", _backward, _setup)
