"""Virtual tokens and text embeddings of every row in one padded tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastprompt import dispatch
from fastprompt.arguments import EmbedPrompts, schema
from fastprompt.errors import ArgumentError
from fastprompt.ops import _checks
from fastprompt.ops._library import define, differentiate, straight, unobserved


def embed_prompts(
    input_ids: Tensor,
    weight: Tensor,
    prompts: Tensor,
    prompt_start: Tensor,
    prompt_len: Tensor,
    *,
    positions: Tensor | None = None,
    scale: float | None = None,
    text_start: Tensor | None = None,
    text_len: Tensor | None = None,
    padding_side: str = "right",
    out_len: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Embeds every row's text and sets its virtual tokens in front of it, or wherever `positions` says.

    Semantics, for row b::

        virtual = prompts[prompt_start : prompt_start + prompt_len]
        text    = weight[input_ids[b, text_start:text_len]] * scale
        row     = virtual token i at index positions[b, i], the text in the places left, in order
        out[b]  = row padded with zeros on padding_side to out_len

    Shapes: `input_ids [B, N]` int64, `weight [V, E]`, an arena of prompts `prompts [T, E]`; int32 or int64 `[B]` for
    `prompt_start`, `prompt_len`, `text_start` (default 0) and `text_len` (an end index, default N); `positions [B, P]`
    with P >= the longest prompt, distinct indices below prompt_len + text length (default: the prompt first).
    `scale` multiplies text embeddings only. `out_len` defaults to N + the longest prompt, which is read from the
    tensor: give it where that would cost a synchronisation or break a graph.
    Returns `[B, out_len, E]` in the dtype of `weight`. Gradients of `weight` and `prompts`.
    Raises `ArgumentError` for what does not fit and `ImplementationError` for an `impl` that cannot run.
    Source: Lester et al. 2021 (arXiv 2104.08691), section 2; templates as in Liu et al. 2021 (arXiv 2103.10385).
    """
    if padding_side not in ("left", "right"):
        raise ArgumentError(f"padding_side is {padding_side!r}, expected 'left' or 'right'")
    call = EmbedPrompts(
        input_ids, weight, prompts, prompt_start, prompt_len, positions, text_start, text_len, padding_side == "left",
        0 if out_len is None else out_len, scale,
    )  # fmt: skip
    if out_len is None:
        _check(call)
        longest = int(prompt_len.max()) if prompt_len.numel() else 0
        call = call._replace(out_len=input_ids.shape[1] + longest)
    chosen = dispatch.choose("embed_prompts", impl, weight.device, weight.dtype, prompts.dtype)
    if chosen == "cpu" and not _checks.needs_grad(weight, prompts) and unobserved(call[:_TENSORS]):
        return straight("embed_prompts", chosen, partial(_check, call), call)
    _check(call)
    return torch.ops.fastprompt.embed_prompts.default(*call, chosen)


def _check(call: EmbedPrompts) -> None:
    input_ids, weight, prompts = call.input_ids, call.weight, call.prompts
    _checks.shape("input_ids", input_ids, (None, None), "[B, N]")
    rows = input_ids.shape[0]
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"input_ids is {input_ids.dtype}, expected int64")
    _checks.shape("weight", weight, (None, None), "[V, E]")
    _checks.shape("prompts", prompts, (None, weight.shape[1]), "[T, E]")
    _checks.floating("weight", weight, input_ids)
    _checks.floating("prompts", prompts, input_ids)
    for name in ("prompt_start", "prompt_len", "text_start", "text_len"):
        _checks.index(name, getattr(call, name), (rows,), "[B]", input_ids)
    _checks.index("positions", call.positions, (rows, None), "[B, P]", input_ids)


def _run(*args: Any) -> Tensor:
    return dispatch.kernels("embed_prompts", args[-1]).forward(EmbedPrompts._make(args[:-1]))


def _fake(input_ids: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return weight.new_empty(input_ids.shape[0], args[-3], weight.shape[1])


def _run_backward(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return dispatch.kernels("embed_prompts", args[-1]).backward(dout, EmbedPrompts._make(args[:-2]), args[-2])


def _fake_backward(
    dout: Tensor, input_ids: Tensor, weight: Tensor, prompts: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    wanted = args[-2]
    return (
        torch.empty_like(weight) if wanted[0] else dout.new_empty(0),
        torch.empty_like(prompts) if wanted[1] else dout.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    *ctx.numbers, ctx.impl = inputs[_TENSORS:]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1:3])
    grads = torch.ops.fastprompt.embed_prompts_backward.default(
        dout, *ctx.saved_tensors, *ctx.numbers, wanted, ctx.impl
    )
    dweight, dprompts = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return (None, dweight, dprompts, *[None] * (len(ctx.needs_input_grad) - 3))


_ARGUMENTS = schema(EmbedPrompts)
_TENSORS = _ARGUMENTS.count("Tensor")  # which come first
define(f"embed_prompts({_ARGUMENTS}, str impl) -> Tensor", _run, _fake)
define(
    f"embed_prompts_backward(Tensor dout, {_ARGUMENTS}, bool[] wanted, str impl) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
differentiate("embed_prompts", _backward, _setup)
