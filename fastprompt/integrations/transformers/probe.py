"""Looks at a transformers model once: where attention happens, what shapes it has, which path prompts can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from fastprompt.context import AttentionCall, Call, Owner, activate
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.integrations.transformers import attention, positions
from fastprompt.integrations.transformers.backbone import Backbone, evaluating
from fastprompt.integrations.transformers.masks import EAGER_NAME
from fastprompt.integrations.transformers.relative_bias import RelativeBias
from fastprompt.spec import PARTS, BackboneSpec, LayerShape

_PROBE_TOKENS = 3


def inspect_backbone(model: PreTrainedModel) -> Backbone:
    """Freeze `model`, switch it to fastprompt's attention where it honours that, and describe it."""
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"backbone is {type(model).__name__}, expected a transformers PreTrainedModel: load one by its name with "
            "AutoModelForCausalLM.from_pretrained; a PeftModel's prompts with PromptedModel.from_peft, what a LoRA "
            "stands on with peft_model.get_base_model()"
        )
    model.requires_grad_(False)
    with evaluating(model):
        calls, why_not = _probe_attention(model)
        return _without_interface(model, why_not) if calls is None else _with_interface(model, calls)


def _owner(model: Any) -> Owner:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return Owner(tuple(configs.values()))


def _probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    device = model.get_input_embeddings().weight.device
    device = model.device if device.type == "meta" else device
    ids = torch.full((1, _PROBE_TOKENS), 3, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :-1]  # fewer, so that cross-attention shows by its lengths
    return inputs


def _probe_attention(model: Any) -> tuple[list[AttentionCall] | None, str]:
    """Attention calls of one small forward through the interface, or None and why there are none."""
    original = model.config._attn_implementation
    try:
        model.set_attn_implementation(EAGER_NAME if original == "eager" else attention.NAME)
        probe: list[AttentionCall] = []
        with torch.no_grad(), activate(Call(_owner(model), probe=probe)):
            (model if model.config.is_encoder_decoder else model.base_model)(**_probe_inputs(model))
    except Exception as error:  # whatever an architecture does with a foreign implementation, it can go the other way
        model.set_attn_implementation(original)
        return None, f"running it through transformers' attention interface failed: {error!r}"
    if probe:
        return probe, ""
    model.set_attn_implementation(original)
    return None, "its attention does not go through transformers' attention interface, or without its masks"


def _with_interface(model: Any, calls: list[AttentionCall]) -> Backbone:
    decoder = set(model.get_decoder().modules()) if model.config.is_encoder_decoder else None
    by_part: dict[str, list[AttentionCall]] = {part: [] for part in PARTS}
    for call in calls:
        if (part := _part(call, decoder)) is not None:
            by_part[part].append(call)
    sites = [call for part in PARTS for call in by_part[part]]
    layers: dict[Any, list[int]] = {call.module: [] for call in calls}
    for i, call in enumerate(sites):
        layers[call.module].append(i)
    biased = [call.module for call in by_part["decoder"] if call.relative_bias]
    for module, indices in layers.items():
        module.fastprompt_site = attention.Site(
            tuple(indices), _relative_bias(module, biased) if module in biased else None
        )
    causal = decoder is not None or all(getattr(c.module, "is_causal", False) for c in calls)
    text, depth = model.config.get_text_config(decoder=True), len(by_part["decoder"])
    whole = depth == getattr(text, "num_hidden_layers", depth)
    compiles = causal and whole and decoder is None and all(len(v) < 2 for v in layers.values())
    reasons = [f"{len(sites)} of {len(calls)} attention calls take a prefix in place, through the attention interface"]
    if decoder is not None:
        reasons.append(f"parts: {', '.join(f'{part} ({len(by_part[part])})' for part in PARTS)}")
    return _describe(
        model,
        path="attention",
        shapes={part: [_shape(call) for call in by_part[part]] for part in PARTS},
        devices=[call.key.device for call in sites],
        causal=causal,
        compiles=compiles and _tokens_meet_in_attention_alone(model),
        reasons=reasons,
    )


def _tokens_meet_in_attention_alone(model: Any) -> bool:
    """Whether a decoder has no other way from token to token, such as a convolution or a recurrence beside attention.

    While attention gives zeros, a first token that is not a number must not reach the others.
    """
    embeds = model.get_input_embeddings()(_probe_inputs(model)["input_ids"]).clone()
    if embeds.is_meta:  # a model without numbers, which shows shapes only
        return True
    embeds[:, 0] = torch.nan
    with torch.no_grad(), activate(Call(_owner(model), probe=[], blind=True)):
        states = model.base_model(inputs_embeds=embeds, use_cache=False)[0]
    return bool(states[:, 1:].isfinite().all())


def _part(call: AttentionCall, decoder: set[nn.Module] | None) -> str | None:
    """Which of `PARTS` an attention call belongs to; `decoder` holds the modules of an encoder-decoder's decoder."""
    if call.self_attention:
        return "decoder" if decoder is None or call.module in decoder else "encoder"
    return "cross" if decoder is not None and call.module in decoder else None


def _shape(call: AttentionCall) -> LayerShape:
    return LayerShape(call.key.shape[1], call.key.shape[3], call.value.shape[3])


def _relative_bias(module: Any, biased: Sequence[Any]) -> RelativeBias:
    """The module's own table of biases, or the first layer's, which T5 shares among all."""
    owner = next(m for m in (module, *biased) if hasattr(m, "relative_attention_bias"))
    return RelativeBias(
        owner.relative_attention_bias, owner.relative_attention_num_buckets, owner.relative_attention_max_distance
    )


def _without_interface(model: Any, why_not: str) -> Backbone:
    if model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"backbone is {type(model).__name__}, which reads {model.main_input_name}, expected one that reads token "
            "ids (input_ids): prompts stand before text"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{model.config.model_type}: {why_not}, and no other path exists for encoder-decoders")
    cache = DynamicCache()
    try:
        with torch.no_grad():
            inputs = _probe_inputs(model)
            model.base_model(**inputs, past_key_values=cache, use_cache=True)
        found: list[Any] = cache.layers
        layers = [layer for layer in found if layer.is_initialized]
    except Exception:  # no cache argument: an encoder
        layers = []
    shapes = [LayerShape(c.keys.shape[1], c.keys.shape[3], c.values.shape[3]) for c in layers]
    whole = len(shapes) == model.config.num_hidden_layers
    path = "cache" if whole else "none"
    then = (
        "prefixes go as padded past_key_values (correct, but copied for every row)"
        if whole
        else "it takes embedding prompts only"
    )
    return _describe(
        model,
        path=path,
        shapes={"decoder": shapes if whole else []},
        devices=[c.keys.device for c in layers] if whole else [],
        causal=whole,
        compiles=whole,
        reasons=[why_not, then],
    )


def _describe(
    model: Any,
    *,
    path: str,
    shapes: Mapping[str, Sequence[LayerShape]],
    devices: Sequence[torch.device],
    causal: bool,
    compiles: bool,
    reasons: list[str],
) -> Backbone:
    embeddings = model.get_input_embeddings().weight
    spec = BackboneSpec(
        model_type=model.config.model_type,
        hidden_size=embeddings.shape[1],
        vocab_size=embeddings.shape[0],
        layers=tuple(shapes["decoder"]),
        causal=causal,
        encoder_decoder=bool(model.config.is_encoder_decoder),
        encoder_layers=tuple(shapes.get("encoder", ())),
        cross_layers=tuple(shapes.get("cross", ())),
    )
    explicit, owner = positions.takes_position_ids(model), _owner(model)
    local = path == "cache" and "local" in getattr(model.config, "attention_layers", ())
    counts_padding = False
    if path == "attention":
        if explicit:
            reasons.append("text positions are given as position_ids")
        elif hooked := positions.hook_position_tables(model, owner):
            counts_padding = spec.encoder_decoder
            reasons.append(f"text positions are moved in {', '.join(hooked)}")
        else:
            reasons.append("positions are relative: nothing to move")
    limit, window = positions.learned_positions(model), model.config.window_size if local else None
    return Backbone(
        model, path, spec, tuple(devices), owner, explicit, reasons, compiles, limit, counts_padding, window
    )
