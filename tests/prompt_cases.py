"""Backbones, and configs of every method, for the tests of prompts."""

from __future__ import annotations

from fastprompt.prompts import (
    Cartridge,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from fastprompt.spec import BackboneSpec, LayerShape

SPEC = BackboneSpec("llama", 12, 97, (LayerShape(2, 6, 6),) * 3, causal=True)
RAGGED = BackboneSpec("mla", 10, 97, (LayerShape(2, 6, 4), LayerShape(1, 3, 5)), causal=True)


CONFIGS = [
    PromptTuning(num_virtual_tokens=7),
    PromptTuning(num_virtual_tokens=1),
    PTuning(num_virtual_tokens=5),
    PTuning(num_virtual_tokens=3, encoder_hidden_size=8, encoder_layers=3, encoder_dropout=0.4),
    PTuning(num_virtual_tokens=4, encoder="wide_lstm", encoder_hidden_size=7, in_place=True),
    PTuning(num_virtual_tokens=5, encoder="mlp", encoder_layers=3, encoder_dropout=0.4),
    PTuning(num_virtual_tokens=5, encoder="mlp", encoder_layers=1, encoder_hidden_size=5),
    PrefixTuning(num_virtual_tokens=7),
    PrefixTuning(num_virtual_tokens=7, reparameterization="mlp", hidden_size=11, embed_size=5, dropout=0.3),
    PrefixTuning(num_virtual_tokens=4, reparameterization="mlp", hidden_size=11, hidden_layers=2),
    PTuningV2(num_virtual_tokens=5),
    PTuningV2(num_virtual_tokens=5, layers=(-1, 0), dropout=0.2),
    PTuningV2(num_virtual_tokens=1, layers=(1,), reparameterization="mlp", hidden_size=3),
    Cartridge(num_virtual_tokens=9),
    Cartridge(num_virtual_tokens=3, num_frozen_tokens=0),
]
