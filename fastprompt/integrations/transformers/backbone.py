"""Looks at a transformers model once: where attention happens, what shapes it has, which path prompts can take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from fastprompt.context import AttentionCall, Call, Owner, activate
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.integrations.transformers import attention, positions
from fastprompt.integrations.transformers.masks import EAGER_NAME
from fastprompt.integrations.transformers.relative_bias import RelativeBias
from fastprompt.spec import BackboneSpec, LayerShape, Prefix

_PROBE_TOKENS = 3
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass
class Backbone:
    """A frozen transformers model and what was found out about it.

    `path` says how a prefix reaches attention: "attention" (fused, in place), "cache" (padded `past_key_values`) or
    "none" (embedding prompts only); `reasons` says why, line by line.
    """

    model: Any  # PreTrainedModel, whose attributes are untyped
    path: str
    spec: BackboneSpec
    probed_devices: tuple[torch.device, ...]
    owner: Owner
    takes_position_ids: bool
    reasons: list[str] = field(default_factory=list)
    compiles: bool = False
    max_positions: int | None = None  # of a learned position table; None where positions are unbounded
    counts_decoder_padding: bool = False  # a decoder that numbers its tokens itself
    counted_window: int | None = None  # a local window on the cache path, which counts padding as positions

    @property
    def encoder_decoder(self) -> bool:
        return self.spec.encoder_decoder

    @property
    def task_type(self) -> str | None:
        """The model's task by PEFT's names, None for one they do not cover."""
        return next((task for suffix, task in _TASKS.items() if type(self.model).__name__.endswith(suffix)), None)

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each layer's attention runs now: a model in one place may have been moved."""
        if getattr(self.model, "hf_device_map", None):
            return self.probed_devices
        return (self.device,) * self.spec.num_layers

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check_attention(self) -> None:
        """Raise if somebody has switched the attention implementation away since."""
        now = self.model.config._attn_implementation
        if self.path == "attention" and now not in (attention.NAME, EAGER_NAME):
            raise UnsupportedError(
                f"the backbone's attention implementation is now {now!r}, which reads no prompts: "
                f'call set_attn_implementation("{attention.NAME}")'
            )

    def compile(self, embeddings: Sequence[torch.Tensor]) -> list[Prefix]:
        """Turn embedding prompts `[P, E]` into prefixes, all in one forward over the prompts' own tokens.

        Exact because under a causal mask a prompt's keys and values do not depend on what follows; right padding
        among the prompts is behind them for the same reason. Differentiable in the embeddings.
        """
        if not self.compiles:
            raise UnsupportedError(
                f"{self.spec.describe()} cannot turn embedding prompts into prefixes: that needs a causal decoder "
                "whose every layer is attention"
            )
        longest = max(e.shape[0] for e in embeddings)
        padded = [nn.functional.pad(e, (0, 0, 0, longest - e.shape[0])) for e in embeddings]
        inputs = torch.stack(padded).to(self.device, self.dtype)
        pairs = self._run_and_record(inputs)
        return [self._cut(pairs, row, e.shape[0]) for row, e in enumerate(embeddings)]

    def activations(self, ids: torch.Tensor) -> Prefix:
        """Keys and values of running token ids `[P]` through the causal backbone."""
        with torch.no_grad():
            return self.compile([self.model.get_input_embeddings()(ids.to(self.device))])[0]

    def _run_and_record(self, inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if isinstance(self.model, FSDPModule):
            raise UnsupportedError(
                "an embedding prompt runs through the backbone's body alone, whose outermost weights FSDP has sharded: "
                "use a prefix, or shard the decoder layers only"
            )
        body = self.model.base_model
        if self.path == "cache":
            cache = DynamicCache()
            body(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            layers: list[Any] = cache.layers
            return [(layer.keys, layer.values) for layer in layers]
        record: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with activate(Call(self.owner, record=record)):
            body(inputs_embeds=inputs, use_cache=False)
        return [record[i] for i in range(self.spec.num_layers)]

    def _cut(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, length: int) -> Prefix:
        keys, values = ([pair[side][row, :, :length] for pair in pairs] for side in (0, 1))
        return Prefix(tuple(range(self.spec.num_layers)), tuple(keys), tuple(values))


def inspect_backbone(model: PreTrainedModel) -> Backbone:
    """Freeze `model`, switch it to fastprompt's attention where it honours that, and describe it."""
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"backbone is {type(model).__name__}, expected a transformers PreTrainedModel "
            "(unwrap PEFT with PromptedModel.from_peft)"
        )
    model.requires_grad_(False)
    attention.register()
    with evaluating(model):
        calls, why_not = _probe_attention(model)
        return _without_interface(model, why_not) if calls is None else _with_interface(model, calls)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    inside = _prefix_modules(model)
    shapes: list[LayerShape] = []
    devices: list[torch.device] = []
    layers: dict[nn.Module, list[int]] = {}
    for call in calls:
        indices = layers.setdefault(call.module, [])
        if call.self_attention and (inside is None or call.module in inside):
            indices.append(len(shapes))
            shapes.append(LayerShape(call.key.shape[1], call.key.shape[3], call.value.shape[3]))
            devices.append(call.key.device)
    tables = [
        c.module for c in calls if c.relative_bias and hasattr(c.module, "relative_attention_bias") and layers[c.module]
    ]
    for call in calls:
        bias = _relative_bias(call.module, tables) if call.relative_bias and layers[call.module] else None
        call.module.fastprompt_site = attention.Site(tuple(layers[call.module]), bias)
    causal = model.config.is_encoder_decoder or all(getattr(c.module, "is_causal", False) for c in calls)
    text = model.config.get_text_config(decoder=True)
    whole = len(shapes) == getattr(text, "num_hidden_layers", len(shapes))
    return _describe(
        model,
        path="attention",
        shapes=shapes,
        devices=devices,
        causal=causal,
        compiles=causal and whole and not model.config.is_encoder_decoder and all(len(v) < 2 for v in layers.values()),
        reasons=[
            f"{len(shapes)} of {len(calls)} attention calls take a prefix in place, through the attention interface"
        ],
    )


def _relative_bias(module: Any, tables: Sequence[Any]) -> RelativeBias:
    owner = module if module in tables else tables[0]
    return RelativeBias(
        owner.relative_attention_bias, owner.relative_attention_num_buckets, owner.relative_attention_max_distance
    )


def _prefix_modules(model: Any) -> set[nn.Module] | None:
    """The modules of an encoder-decoder's decoder; None where every self-attention takes a prefix."""
    return set(model.get_decoder().modules()) if model.config.is_encoder_decoder else None


def _without_interface(model: Any, why_not: str) -> Backbone:
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
        shapes=shapes if whole else [],
        devices=[c.keys.device for c in layers] if whole else [],
        causal=whole,
        compiles=whole,
        reasons=[why_not, then],
    )


def _describe(
    model: Any,
    *,
    path: str,
    shapes: Sequence[LayerShape],
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
        layers=tuple(shapes),
        causal=causal,
        encoder_decoder=bool(model.config.is_encoder_decoder),
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
