"""Configs, backbones and heads that cannot be: every error says what is wrong."""

from __future__ import annotations

import pytest
import torch
from prompt_cases import CONFIGS, SPEC

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.prompts import (
    Cartridge,
    PrefixTuning,
    PromptHead,
    PromptTuning,
    PTuning,
    PTuningV2,
    SoftPrompt,
    config_from_dict,
)
from fastprompt.spec import BackboneSpec

BAD = [
    (PromptTuning, {}, TypeError, "num_virtual_tokens"),
    (PromptTuning, {"num_virtual_tokens": 0}, ArgumentError, "num_virtual_tokens is 0, expected an int >= 1"),
    (PromptTuning, {"num_virtual_tokens": True}, ArgumentError, "num_virtual_tokens is True"),
    (PromptTuning, {"num_virtual_tokens": 2.0}, ArgumentError, "num_virtual_tokens is 2.0"),
    (PromptTuning, {"num_virtual_tokens": 2, "init": "zeros"}, ArgumentError, "init is 'zeros'"),
    (PromptTuning, {"num_virtual_tokens": 2, "init": "text"}, ArgumentError, "init_text is None"),
    (PromptTuning, {"num_virtual_tokens": 2, "init_text": " "}, ArgumentError, "init_text is ' '"),
    (PromptTuning, {"num_virtual_tokens": 2, "init": "labels"}, ArgumentError, "init_labels is None"),
    (PromptTuning, {"num_virtual_tokens": 2, "init_labels": "yes"}, ArgumentError, "init_labels is 'yes'"),
    (PromptTuning, {"num_virtual_tokens": 1, "init": "labels", "init_labels": ("a", "b")}, ArgumentError, ">= 2"),
    (PromptTuning, {"num_virtual_tokens": 2, "vocab_top": 0}, ArgumentError, "vocab_top is 0"),
    (PTuning, {"num_virtual_tokens": 2, "encoder": "gru"}, ArgumentError, "encoder is 'gru'"),
    (PTuning, {"num_virtual_tokens": 2, "encoder_hidden_size": 7}, ArgumentError, "even"),
    (PTuning, {"num_virtual_tokens": 2, "in_place": "yes"}, ArgumentError, "in_place is 'yes', expected True or False"),
    (PTuning, {"num_virtual_tokens": 2, "encoder_layers": 0}, ArgumentError, "encoder_layers is 0"),
    (PTuning, {"num_virtual_tokens": 2, "encoder_dropout": 1.0}, ArgumentError, "encoder_dropout is 1.0"),
    (PrefixTuning, {"num_virtual_tokens": 2, "dropout": -0.1}, ArgumentError, "dropout is -0.1"),
    (PrefixTuning, {"num_virtual_tokens": 2, "dropout": float("nan")}, ArgumentError, "dropout is nan"),
    (PrefixTuning, {"num_virtual_tokens": 2, "reparameterization": "lstm"}, ArgumentError, "reparameterization"),
    (PrefixTuning, {"num_virtual_tokens": 2, "hidden_size": 0}, ArgumentError, "hidden_size is 0"),
    (PrefixTuning, {"num_virtual_tokens": 2, "embed_size": -1}, ArgumentError, "embed_size is -1"),
    (PrefixTuning, {"num_virtual_tokens": 2, "init": "activations"}, ArgumentError, "init_text is None"),
    (PrefixTuning, {"num_virtual_tokens": 2, "init_std": -1.0}, ArgumentError, "init_std is -1.0"),
    (PrefixTuning, {"num_virtual_tokens": 2, "hidden_layers": 3}, ArgumentError, "hidden_layers is 3, expected 1 or 2"),
    (PrefixTuning, {"num_virtual_tokens": 2, "parts": ()}, ArgumentError, r"parts is \(\)"),
    (PrefixTuning, {"num_virtual_tokens": 2, "parts": "cross"}, ArgumentError, "parts is 'cross'"),
    (PrefixTuning, {"num_virtual_tokens": 2, "parts": ("cross", "cross")}, ArgumentError, "each once"),
    (PrefixTuning, {"num_virtual_tokens": 2, "parts": ("self",)}, ArgumentError, 'expected some of "encoder"'),
    (PTuningV2, {"num_virtual_tokens": 2, "hidden_layers": 0}, ArgumentError, "hidden_layers is 0"),
    (PTuningV2, {"num_virtual_tokens": 2, "layers": ()}, ArgumentError, r"layers is \(\)"),
    (PTuningV2, {"num_virtual_tokens": 2, "layers": (0.5,)}, ArgumentError, "layers is"),
    (PTuningV2, {"num_virtual_tokens": 2, "layers": 1}, ArgumentError, "layers is 1"),
    (Cartridge, {"num_virtual_tokens": 2, "num_frozen_tokens": 3}, ArgumentError, "at most num_virtual_tokens=2"),
    (Cartridge, {"num_virtual_tokens": 2, "num_frozen_tokens": -1}, ArgumentError, "num_frozen_tokens is -1"),
]


@pytest.mark.parametrize(("method", "fields", "error", "message"), BAD, ids=lambda v: str(v)[:60])
def test_bad_configs_say_what_is_wrong(method, fields, error, message):
    with pytest.raises(error, match=message):
        method(**fields)


@pytest.mark.parametrize("layers", [(3,), (-4,), (0, 9), (0, -3), (1, 1)])
def test_layers_out_of_range_or_twice_are_refused(layers):
    config = PTuningV2(num_virtual_tokens=2, layers=layers)
    with pytest.raises(ArgumentError, match="layers"):
        config.build(SPEC)


def test_unknown_methods_and_fields_are_refused():
    with pytest.raises(ArgumentError, match="method is 'lora', expected one of prompt_tuning, p_tuning"):
        config_from_dict("lora", {})
    with pytest.raises(ArgumentError, match=r"no fields \['depth'\]"):
        config_from_dict("p_tuning_v2", {"num_virtual_tokens": 2, "depth": 3})
    with pytest.raises(ArgumentError, match="num_virtual_tokens"):
        config_from_dict("p_tuning_v2", {})


@pytest.mark.parametrize("method", [PrefixTuning, PTuningV2, Cartridge])
def test_a_prefix_needs_layers_to_enter(method):
    bare = BackboneSpec("deberta", 12, 97, (), causal=False)
    with pytest.raises(UnsupportedError, match="use PromptTuning or PTuning"):
        method(num_virtual_tokens=2).build(bare)
    assert isinstance(PromptTuning(num_virtual_tokens=2).build(bare), SoftPrompt)


def test_an_odd_backbone_needs_a_hidden_size_for_the_lstm():
    odd = BackboneSpec("odd", 7, 97, (), causal=True)
    with pytest.raises(ArgumentError, match="encoder_hidden_size is 7, expected an even number"):
        PTuning(num_virtual_tokens=2).build(odd)
    assert PTuning(num_virtual_tokens=2, encoder_hidden_size=4).build(odd)().shape == (2, 7)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_restore_checks_the_shape(config):
    with pytest.raises(ArgumentError, match="weights have shape"):
        config.restore(SPEC, torch.zeros(config.num_virtual_tokens, config.width(SPEC) + 1))


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", "weight."])
def test_head_names_are_checked(name):
    with pytest.raises(ArgumentError, match="head parameter"):
        PromptHead("classifier", {name: torch.zeros(1)})
    with pytest.raises(ArgumentError, match="no parameters"):
        PromptHead("classifier", {})
    with pytest.raises(ArgumentError, match="head module"):
        PromptHead("../x", {"weight": torch.zeros(1)})
    with pytest.raises(ArgumentError, match=r"'weight' is \[0, 12\]"):
        PromptHead("classifier", {"weight": torch.zeros(0, 12)})
