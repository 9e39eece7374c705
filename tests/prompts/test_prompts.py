"""Every method: shapes, gradients, seeds, round trips, collapse, version keys."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from prompt_cases import CONFIGS, RAGGED, SPEC
from torch.nn.functional import tanh

from fastprompt.prompts import (
    METHODS,
    Cartridge,
    PrefixTuning,
    PromptHead,
    PromptTuning,
    PTuning,
    PTuningV2,
    config_from_dict,
)
from fastprompt.spec import Prefix, flatten


def tensors(output: torch.Tensor | Prefix) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [*output.keys, *output.values]


def same(a: torch.Tensor | Prefix, b: torch.Tensor | Prefix) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("spec", [SPEC, RAGGED], ids=["uniform", "ragged"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_output_has_the_backbones_shapes(config, spec):
    prompt = config.build(spec, seed=0)
    output = prompt()
    assert prompt.length == config.num_virtual_tokens
    assert all(t.dtype == torch.float32 for t in tensors(output))
    if config.kind == "embedding":
        assert output.shape == (prompt.length, spec.hidden_size)
        return
    assert output.layers == config.prefix_layers(spec) and output.length == prompt.length
    for i, key, value in zip(output.layers, output.keys, output.values, strict=True):
        shape = spec.layers[i]
        assert key.shape == (shape.kv_heads, prompt.length, shape.key_dim)
        assert value.shape == (shape.kv_heads, prompt.length, shape.value_dim)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_reach_every_parameter(config):
    torch.manual_seed(0)
    prompt = config.build(SPEC, seed=0).eval()
    sum((t * torch.randn_like(t)).sum() for t in tensors(prompt())).backward()
    parameters = dict(prompt.named_parameters())
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_seed_repeats_the_init_and_leaves_the_generator(config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (config.build(SPEC, seed=s).eval() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first(), again()) and not same(first(), other())


def test_without_a_seed_the_generator_is_used():
    config = PromptTuning(num_virtual_tokens=4)
    torch.manual_seed(1)
    first = config.build(SPEC)()
    assert not torch.equal(first, config.build(SPEC)())
    torch.manual_seed(1)
    assert torch.equal(first, config.build(SPEC)())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_json_round_trip(config):
    text = json.dumps(config.to_dict())
    assert config_from_dict(config.method, json.loads(text)) == config
    assert METHODS[config.method] is type(config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_collapse_is_equal_and_independent(config):
    prompt = config.build(SPEC, seed=0).eval()
    prompt.head = PromptHead("classifier", {"weight": torch.randn(2, 12)})
    prompt.labels, prompt.task_type, prompt.record = ("a", "b"), "SEQ_CLS", {"steps": 3}
    flat = prompt.collapse()
    with torch.no_grad():  # an LSTM rounds otherwise when it records gradients
        assert same(flat(), prompt())
    assert flat.labels == prompt.labels and flat.task_type == "SEQ_CLS" and flat.record == {"steps": 3}
    assert torch.equal(flat.head.tensors()["weight"], prompt.head.tensors()["weight"])
    assert same(flat.collapse()(), flat())
    original = copy.deepcopy(prompt)()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.add_(1.0)
    assert same(prompt(), original) and not same(flat(), prompt())


def test_collapse_ignores_dropout_and_keeps_the_mode():
    prompt = PTuning(num_virtual_tokens=3, encoder="mlp", encoder_dropout=0.9).build(SPEC, seed=0).train()
    flat = prompt.collapse()
    assert prompt.training and prompt.encoder.training and flat.training
    with torch.no_grad():
        assert torch.equal(flat(), prompt.eval()())


def test_dropout_acts_in_training_only():
    prompt = PTuningV2(num_virtual_tokens=50, dropout=0.5, init_std=1.0).build(SPEC, seed=0)
    torch.manual_seed(0)
    dropped = tensors(prompt.train()())[0]
    kept = tensors(prompt.eval()())[0]
    zeros = (dropped == 0).float().mean().item()
    # 600 draws of probability 0.5: five standard deviations are 0.11
    assert abs(zeros - 0.5) < 0.11 and (kept != 0).all()
    assert torch.allclose(dropped[dropped != 0], 2 * kept[dropped != 0])


def test_lstm_encoder_is_the_papers_shape():
    prompt = PTuning(num_virtual_tokens=5, encoder_hidden_size=8).build(SPEC, seed=0)
    encoder = prompt.encoder
    assert encoder.lstm.num_layers == 2 and encoder.lstm.bidirectional and encoder.lstm.hidden_size == 4
    states = encoder.lstm(encoder.positions.weight.unsqueeze(1))[0].squeeze(1)
    first, last = encoder.mlp[0], encoder.mlp[2]
    expected = torch.relu(states @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert torch.allclose(prompt(), expected, rtol=1e-5, atol=1e-6)


def test_wide_lstm_encoder_is_the_few_shot_codes_shape():
    encoder = PTuning(num_virtual_tokens=5, encoder="wide_lstm").build(SPEC, seed=0).encoder
    assert encoder.lstm.input_size == encoder.lstm.hidden_size == 12 and encoder.lstm.num_layers == 2
    assert [(m.in_features, m.out_features) for m in (encoder.mlp[0], encoder.mlp[2])] == [(24, 12), (12, 12)]
    mlp = PTuning(num_virtual_tokens=5, encoder="mlp").build(SPEC, seed=0).encoder.mlp
    assert [m.out_features for m in mlp if hasattr(m, "out_features")] == [12, 12]  # E -> E -> ReLU -> E


def test_only_in_place_prompts_stand_in_place():
    assert PTuning(num_virtual_tokens=5, in_place=True).build(SPEC).in_place
    assert not PTuning(num_virtual_tokens=5).build(SPEC).in_place
    assert not PromptTuning(num_virtual_tokens=5).build(SPEC).in_place


def test_prefix_mlp_is_the_papers_formula():
    prompt = PrefixTuning(num_virtual_tokens=4, reparameterization="mlp", hidden_size=5).build(SPEC, seed=0)
    wte, (first, _, last) = prompt.encoder.positions.weight, prompt.encoder.mlp
    flat = tanh(wte @ first.weight.T + first.bias) @ last.weight.T + last.bias
    slots = flat.view(4, 2 * 3, 2, 6)  # P, 2L, heads, D
    for i in range(3):
        assert torch.allclose(prompt().keys[i], slots[:, 2 * i].transpose(0, 1), atol=1e-6)
        assert torch.allclose(prompt().values[i], slots[:, 2 * i + 1].transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize("method", [PrefixTuning, PTuningV2])
def test_two_hidden_layers_are_the_authors_deep_network(method):
    prompt = method(num_virtual_tokens=4, reparameterization="mlp", hidden_size=5, hidden_layers=2).build(SPEC, seed=0)
    x = prompt.encoder.positions.weight
    for linear in list(prompt.encoder.mlp)[:-1:2]:
        x = tanh(x @ linear.weight.T + linear.bias)
    last = prompt.encoder.mlp[-1]
    assert [m.out_features for m in list(prompt.encoder.mlp)[::2]] == [5, 5, 72]
    assert torch.allclose(flatten(prompt()), x @ last.weight.T + last.bias, atol=1e-6)


@pytest.mark.parametrize("method", [PrefixTuning, PTuningV2])
def test_embedding_is_another_name_for_the_table(method):
    named, plain = method(num_virtual_tokens=4, reparameterization="embedding"), method(num_virtual_tokens=4)
    assert named == plain and same(named.build(SPEC, seed=0)(), plain.build(SPEC, seed=0)())


def test_a_cartridges_first_tokens_do_not_train():
    prompt = Cartridge(num_virtual_tokens=5, num_frozen_tokens=2).build(SPEC, seed=0)
    before = prompt.weights().clone()
    optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0)
    sum(t.sum() for t in tensors(prompt())).backward()
    optimizer.step()
    after = prompt.weights()
    assert torch.equal(after[:2], before[:2]) and torch.equal(after[2:], before[2:] - 1.0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_version_key_follows_every_parameter(config):
    prompt = config.build(SPEC, seed=0)
    for parameter in prompt.encoder.parameters():
        key = prompt.version_key()
        assert key == prompt.version_key() and hash(key) == hash(prompt.version_key())
        with torch.no_grad():
            parameter.mul_(1.5)
        assert prompt.version_key() != key
    key = prompt.version_key()
    prompt.to(torch.bfloat16)
    assert prompt.version_key() != key


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_version_key_follows_an_optimizer(optimizer, options):
    prompt = PromptTuning(num_virtual_tokens=3).build(SPEC, seed=0)
    key = prompt.version_key()
    prompt().sum().backward()
    optimizer(prompt.parameters(), lr=0.1, **options).step()
    assert prompt.version_key() != key


def test_version_key_of_a_frozen_prompt_ignores_other_training():
    prompt = PromptTuning(num_virtual_tokens=3).build(SPEC, seed=0).requires_grad_(False)
    other = PromptTuning(num_virtual_tokens=3).build(SPEC, seed=0)
    key = prompt.version_key()
    other().sum().backward()
    torch.optim.AdamW(other.parameters(), fused=True).step()
    assert prompt.version_key() == key


def test_touch_tells_of_writes_that_torch_does_not_see():
    prompt = PTuning(num_virtual_tokens=3).build(SPEC, seed=0)
    key = prompt.version_key()
    prompt.encoder.positions.weight.data.zero_()
    prompt.touch()
    assert prompt.version_key() != key


def test_a_prompt_built_under_inference_mode_can_train():
    with torch.inference_mode():
        prompt = PrefixTuning(num_virtual_tokens=3).build(SPEC, seed=0).collapse()
    assert prompt.version_key() == prompt.version_key()
    sum(t.sum() for t in tensors(prompt())).backward()
    assert all(p.grad is not None for p in prompt.parameters())


def test_state_dict_round_trip_with_a_head():
    prompt = PTuningV2(num_virtual_tokens=3, layers=(0, 2)).build(SPEC, seed=0)
    prompt.head = PromptHead("classifier", {"dense.weight": torch.randn(4, 12), "out_proj.bias": torch.randn(2)})
    other = copy.deepcopy(prompt)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(prompt.state_dict())
    assert same(other(), prompt())
    assert set(other.head.tensors()) == {"dense.weight", "out_proj.bias"}
    assert torch.equal(other.head.tensors()["out_proj.bias"], prompt.head.tensors()["out_proj.bias"])
