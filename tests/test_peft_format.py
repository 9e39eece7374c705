"""PEFT adapter folders against PEFT itself: what we read is what PEFT uses."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from peft import (
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft_cases import (
    BACKBONES,
    LENGTH,
    PAIRS,
    PREFIXES,
    adapt,
    check_equal,
    saved,
    spec,
    used,
)

from fastprompt.peft_format import is_peft_folder, prompt_from_peft, read_peft, write_peft
from fastprompt.prompts import Cartridge, PrefixTuning, PTuning


@pytest.mark.parametrize(("backbone", "adapter"), PAIRS)
def test_what_is_read_is_what_peft_uses(backbone, adapter, tmp_path):
    model = adapt(backbone, adapter)
    folder = saved(model, tmp_path / "a")
    assert is_peft_folder(folder)
    task = 1 if adapter == "multitask" else None
    prompt = read_peft(folder, BACKBONES[backbone][1], task_id=task)
    assert prompt.kind == ("prefix" if adapter in PREFIXES else "embedding") and prompt.length == LENGTH
    assert prompt.task_type == BACKBONES[backbone][2]
    check_equal(prompt, used(model, task or 0))
    assert all(p.requires_grad for p in prompt.parameters())


@pytest.mark.parametrize("task", [0, 1, 2])
def test_each_task_of_a_multitask_prompt(task, tmp_path):
    model = adapt("t5", "multitask")
    prompt = read_peft(saved(model, tmp_path), BACKBONES["t5"][1], task_id=task)
    check_equal(prompt, used(model, task))


@pytest.mark.parametrize(
    ("backbone", "module", "names"),
    [
        ("bert", "classifier", {"weight", "bias"}),
        ("roberta", "classifier", {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}),
        ("bert_token", "classifier", {"weight", "bias"}),
        ("bert_qa", "qa_outputs", {"weight", "bias"}),
    ],
)
def test_heads_are_read(backbone, module, names, tmp_path):
    model = adapt(backbone, "prefix")
    head = read_peft(saved(model, tmp_path), BACKBONES[backbone][1]).head
    assert head.module == module and set(head.tensors()) == names
    wrapped = model.base_model.get_submodule(module).modules_to_save["default"]
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(head.tensors()[name], parameter)


def test_a_head_of_several_modules_starts_at_the_backbone(tmp_path):
    config = PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=32, num_attention_heads=4, num_layers=3
    )
    model = get_peft_model(zoo.encoder("distilbert"), config)
    bare = spec("distilbert", 3, causal=False)
    prompt = read_peft(saved(model, tmp_path / "a"), bare)
    assert prompt.head.module == ""
    assert {n.rpartition(".")[0] for n in prompt.head.tensors()} == {"pre_classifier", "classifier"}
    again = PeftModel.from_pretrained(zoo.encoder("distilbert", seed=5), write_peft(tmp_path / "b", prompt))
    for name, tensor in prompt.head.tensors().items():
        module, _, leaf = name.rpartition(".")
        wrapped = again.base_model.get_submodule(module).modules_to_save["default"]
        assert torch.equal(wrapped.get_parameter(leaf), tensor)


def test_the_method_is_remembered(tmp_path):
    methods = {a: read_peft(saved(adapt("llama", a), tmp_path / a), BACKBONES["llama"][1]).config for a in PREFIXES}
    assert methods["prefix"] == PrefixTuning(num_virtual_tokens=LENGTH, hidden_size=16)
    assert methods["projected"] == PrefixTuning(num_virtual_tokens=LENGTH, reparameterization="mlp", hidden_size=7)
    assert methods["cartridge"] == Cartridge(num_virtual_tokens=LENGTH, num_frozen_tokens=2)
    lstm = read_peft(saved(adapt("llama", "lstm"), tmp_path / "lstm"), BACKBONES["llama"][1]).config
    assert lstm == PTuning(num_virtual_tokens=LENGTH, encoder="lstm", encoder_hidden_size=14)


@pytest.mark.parametrize("adapter", ["prefix", "lstm"])
def test_a_live_peft_model_is_read_without_files(adapter):
    model = adapt("bert", adapter)
    config, tensors = model.peft_config["default"].to_dict(), get_peft_model_state_dict(model)
    prompt = prompt_from_peft(config, tensors, BACKBONES["bert"][1])
    check_equal(prompt, used(model))
    assert prompt.task_type == "SEQ_CLS" and type(prompt.task_type) is str and prompt.head is not None


def test_reading_leaves_the_adapter_unshared():
    model = adapt("llama", "prefix")
    config, tensors = model.peft_config["default"].to_dict(), get_peft_model_state_dict(model)
    before = copy.deepcopy(dict(tensors))
    prompt = prompt_from_peft(config, tensors, BACKBONES["llama"][1])
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], tensors[k]) for k in before)
