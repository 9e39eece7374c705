"""Architectures PEFT cannot serve with prefixes, against plain float64 attention over concatenated keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from transformers import AttentionInterface, AttentionMaskInterface

import fastprompt as fp

P, TOKENS = 7, 15


class ConcatenatedAttention:
    """An attention function of its own: float64, prefix and own keys in one tensor, masks written out."""

    def __init__(self, prefix: Any, causal: bool, windows: list[int | None]) -> None:
        self.prefix, self.causal, self.windows = prefix, causal, windows
        self.calls = 0

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
        layer = self.calls
        self.calls += 1
        at = self.prefix.layers.index(layer) if layer in self.prefix.layers else None
        if at is not None:
            k = torch.cat([self.prefix.keys[at].double()[None], k], dim=2)
            v = torch.cat([self.prefix.values[at].double()[None], v], dim=2)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        own = torch.arange(TOKENS) + P
        keys = own if at is None else torch.cat([torch.arange(P), own])
        distance = own[:, None] - keys
        hidden = (distance < 0) & self.causal
        if (window := self.windows[layer]) is not None:
            hidden |= distance.abs() > window
        logits = (q @ k.mT) * (scaling or q.shape[-1] ** -0.5)
        return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2), None


def float64_logits(backbone: Any, prefix: Any, ids: torch.Tensor, causal: bool) -> torch.Tensor:
    windows: list[int | None] = [None] * backbone.config.num_hidden_layers
    if backbone.config.model_type == "modernbert":  # every second layer is global
        half = backbone.config.local_attention // 2
        windows = [half if kind == "sliding_attention" else None for kind in backbone.config.layer_types]
    oracle = ConcatenatedAttention(prefix, causal, windows)
    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", lambda **_: None)
    backbone.set_attn_implementation("oracle")
    positions = torch.arange(TOKENS)[None] + P
    out = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    assert oracle.calls == len(windows)
    return out


@pytest.mark.parametrize("chosen", [None, (0, 2)], ids=["all_layers", "chosen_layers"])
@pytest.mark.parametrize("name", ["albert", "modernbert", "distilbert", "bert", "deepseek_v3", "llama"])
def test_prefix(name: str, chosen: tuple[int, ...] | None) -> None:
    causal = name in zoo.CAUSAL
    dense = {"first_k_dense_replace": 3} if name == "deepseek_v3" else {}  # torch's grouped experts know no float64
    backbone = zoo.causal(name, **dense) if causal else zoo.encoder(name)
    twin = copy.deepcopy(backbone).double()
    model = fp.PromptedModel(backbone)
    prompt = model.add_prompt("it", fp.PTuningV2(num_virtual_tokens=P, layers=chosen))
    prompt.head = None
    with torch.no_grad():
        prompt.encoder.weight.normal_(0.0, 0.6)
        ids = torch.randint(3, zoo.VOCAB, (1, TOKENS))
        expected = float64_logits(twin, prompt(), ids, causal)
        bare = model.eval()(input_ids=ids).logits
        got = model(input_ids=ids, prompts="it").logits
    scale = expected.abs().max()
    assert (got - bare).abs().max() > 1e-2 * scale  # the prompt matters
    assert (got - expected).abs().max() <= 1e-5 * scale
