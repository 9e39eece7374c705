"""Reading and preparing the tensors of a forward or generate call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fastprompt.errors import ArgumentError


def batch_rows(inputs: dict[str, Any]) -> int:
    """Number of rows of a call, from whichever input it was given; ArgumentError for one that has no rows of tokens."""
    for name, dim, what in (
        ("input_ids", 2, "an int64 tensor [B, N], as a tokenizer gives it with return_tensors='pt'"),
        ("inputs_embeds", 3, "a tensor [B, N, E]"),
        ("decoder_input_ids", 2, "an int64 tensor [B, N]"),
        ("attention_mask", 2, "a tensor [B, N] of ones and zeros"),
    ):
        given = inputs.get(name)
        if given is None:
            continue
        if not isinstance(given, torch.Tensor) or given.dim() != dim or not given.numel():
            came = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
            raise ArgumentError(f"{name} is {came}, expected {what}, with at least one token")
        if name.endswith("input_ids") and given.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"{name} is {given.dtype}, expected int64: the ids of tokens")
        return given.shape[0]
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        return encoded[0].shape[0]
    raise ArgumentError("neither input_ids nor inputs_embeds was given, expected one of them")


def tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """The tensor `[B, N, ...]` that holds the call's tokens."""
    given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if given is None:
        raise ArgumentError("neither input_ids nor inputs_embeds was given, expected one of them")
    return given


def body_of(model: Any) -> Any:
    """The innermost part of a decoder that looks up `input_ids` or takes `inputs_embeds` in their stead."""
    table = model.get_input_embeddings()
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return next(m for m in reversed(parts) if any(inner is table for inner in m.modules()))


def check_masks(inputs: dict[str, Any]) -> None:
    """Attention masks must say which tokens are real, `[B, tokens]`; a 4-D pattern leaves no place for prompts."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            came = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ArgumentError(f"{name} is {came}, expected a tensor [B, tokens] of ones and zeros with prompts")
    mask = inputs.get("attention_mask")
    own = next((inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
    if mask is not None and own is not None and (len(mask) != len(own) or mask.shape[1] < own.shape[1]):
        raise ArgumentError(
            f"attention_mask is {list(mask.shape)}, expected {list(own.shape[:2])}: one entry for each of the tokens"
        )


def text_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """The 2-D mask int64 `[B, seen + N]` of real own tokens; all ones where none was given."""
    mask, own = inputs.get("attention_mask"), tokens(inputs)
    if mask is not None:
        return mask.to(torch.int64)
    cache = inputs.get("past_key_values")
    seen = 0
    if cache is not None:
        seen = int(cache.get_seq_length()) - getattr(cache, "prefix_length", 0)
    return torch.ones(own.shape[0], seen + own.shape[1], dtype=torch.int64, device=own.device)


def generation_option(inputs: dict[str, Any], name: str, usual: Any = None) -> Any:
    """What a call of `generate` says: by an argument of its own, or in its `generation_config`; or `usual`."""
    if name in inputs:
        return inputs[name]
    given = getattr(inputs.get("generation_config"), name, None)
    return usual if given is None else given


def infer_mask(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Take padding tokens for padding where no mask is given, as transformers' generation does."""
    ids, pad = inputs.get("input_ids"), generation_option(inputs, "pad_token_id", config.pad_token_id)
    if ids is None or pad is None or any(inputs.get(n) is not None for n in ("attention_mask", "past_key_values")):
        return inputs
    ends = generation_option(inputs, "eos_token_id", config.eos_token_id)
    if pad in (ends if isinstance(ends, (list, tuple)) else [ends]) or not bool((ids == pad).any()):
        return inputs
    return inputs | {"attention_mask": (ids != pad).long()}


def pad_left(inputs: dict[str, Any]) -> dict[str, Any]:
    """Move right padding to the left, as generation needs it; inputs without right padding come back unchanged."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != tokens(inputs).shape[:2] or bool(mask[:, -1].all()):
        return inputs
    order = mask.bool().int().sort(dim=1, stable=True).indices  # padding first, text in its order
    moved = {
        name: value.gather(1, order.view(*order.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:]))
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == mask.shape
    }
    return inputs | moved
