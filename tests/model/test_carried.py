"""Prompts on backbones that carry something: adapters, quantised weights, hooks, another dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from feature_cases import GREEDY, prompted
from transformers import DynamicCache


def explicit_past(backbone: Any, prefix: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one row with the prefix handed over as ordinary past keys and values."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(k[None].to(backbone.dtype), v[None].to(backbone.dtype), layer)
    return backbone(input_ids=ids, past_key_values=cache).logits[0]


def with_lora(live: bool) -> Any:
    import peft

    model = peft.get_peft_model(
        zoo.causal("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.3)
    return model.get_base_model() if live else model.merge_and_unload()


def quantised() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = zoo.causal("llama", hidden_size=64, intermediate_size=128)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def dispatched() -> Any:
    import accelerate

    return accelerate.dispatch_model(zoo.causal("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_lora(live=True),
        lambda: with_lora(live=False),
        quantised,
        dispatched,
        lambda: zoo.causal("llama").bfloat16(),
    ],
    ids=["live_lora", "merged_lora", "torchao_int8", "device_map", "bf16"],
)
def test_prompts_on_a_backbone_that_carries_something(make: Any) -> None:
    backbone = make().eval()
    untouched = copy.deepcopy(backbone)
    model = prompted(backbone)
    ids = torch.randint(3, zoo.VOCAB, (3, 11))
    rows = ["prefix", None, "embed"]
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=torch.ones_like(ids), prompts=rows).logits
        expected = [
            explicit_past(untouched, model.library["prefix"](), ids[:1]),
            untouched(input_ids=ids[1:2]).logits[0],
            explicit_past(untouched, model._info.compile([model.library["embed"]()])[0], ids[2:]),
        ]
    tolerance = 1e-5 if backbone.dtype == torch.float32 else 4 * torch.finfo(backbone.dtype).eps
    for got, want in zip(mixed, expected, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert model.generate(input_ids=ids, prompts=rows, **GREEDY).shape == (3, 21)
