"""PEFT adapter folders against PEFT itself: what we write PEFT loads, with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from peft import (
    PeftModel,
)
from peft_cases import (
    BACKBONES,
    LENGTH,
    PAIRS,
    adapt,
    check_equal,
    logits,
    saved,
    spec,
    used,
    works_in_peft,
)
from transformers import DynamicCache

from fastprompt.errors import DuplicatePromptError, UnsupportedError
from fastprompt.peft_format import read_peft, write_peft
from fastprompt.prompts import Cartridge, PrefixTuning, PromptHead, PromptTuning, PTuning, PTuningV2, SoftPrompt
from fastprompt.spec import Prefix


@pytest.mark.parametrize(("backbone", "adapter"), [(b, a) for b, a in PAIRS if works_in_peft(b, a)])
def test_peft_to_us_to_peft_keeps_the_logits(backbone, adapter, tmp_path):
    make, backbone_spec, _ = BACKBONES[backbone]
    model = adapt(backbone, adapter)
    multitask = adapter == "multitask"
    expected = logits(model, **({"task_ids": torch.tensor([2])} if multitask else {}))
    prompt = read_peft(saved(model, tmp_path / "a"), backbone_spec, task_id=2 if multitask else None)
    write_peft(tmp_path / "b", prompt)
    again = PeftModel.from_pretrained(make(), tmp_path / "b").eval()
    got = logits(again)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (logits(make().eval()) - expected).abs().max() > 1e-2  # the adapter matters
    again_read = read_peft(tmp_path / "b", backbone_spec)
    assert torch.equal(again_read.weights(), prompt.weights())


OURS = [
    PromptTuning(num_virtual_tokens=LENGTH),
    PTuning(num_virtual_tokens=LENGTH),
    PTuning(num_virtual_tokens=LENGTH, encoder="wide_lstm", encoder_hidden_size=5),
    PTuning(num_virtual_tokens=LENGTH, encoder="mlp", encoder_layers=4),
    PrefixTuning(num_virtual_tokens=LENGTH),
    PrefixTuning(num_virtual_tokens=LENGTH, reparameterization="mlp"),
    PTuningV2(num_virtual_tokens=LENGTH, layers=(0, 1, 2)),
    Cartridge(num_virtual_tokens=LENGTH, num_frozen_tokens=3),
]


@pytest.mark.parametrize("config", OURS, ids=str)
@pytest.mark.parametrize("backbone", ["llama", "t5_odd"])
def test_our_prompts_act_the_same_in_peft(config, backbone, tmp_path):
    make, backbone_spec, _ = BACKBONES[backbone]
    prompt = config.build(backbone_spec, seed=0).eval()
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    write_peft(tmp_path / "a", prompt, base_model_name_or_path="tiny")
    model = PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    check_equal(prompt, used(model))
    if backbone == "llama":
        got = logits(model)
        expected = by_hand(make().eval(), prompt)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


@torch.no_grad()
def by_hand(model: torch.nn.Module, prompt: SoftPrompt) -> torch.Tensor:
    """Logits with explicit past keys, or with the prompt's embeddings before the text's."""
    ids, made = torch.arange(3, 14)[None], prompt()
    if isinstance(made, Prefix):
        cache = DynamicCache()
        for i, key, value in zip(made.layers, made.keys, made.values, strict=True):
            cache.update(key[None], value[None], i)
        return model(input_ids=ids, past_key_values=cache).logits
    text = model.get_input_embeddings()(ids)
    return model(inputs_embeds=torch.cat([made[None], text], dim=1)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_no_two_decoder_layers_share_slots(name, layers, tmp_path):
    """In PEFT's own adapters of even L they do; ours are written so that every prefix is kept."""
    decoder = spec(name, layers, seq2seq=True)
    prompt = PrefixTuning(num_virtual_tokens=2, init_std=1.0).build(decoder, seed=0)
    write_peft(tmp_path / "a", prompt)
    assert torch.equal(read_peft(tmp_path / "a", decoder).weights(), prompt.weights())
    sizes = {"decoder_layers": layers} if name == "bart" else {"num_layers": layers, "num_decoder_layers": layers}
    model = PeftModel.from_pretrained(zoo.seq2seq(name, **sizes), tmp_path / "a").eval()
    check_equal(prompt, used(model))
    ids = torch.arange(3, 9)[None]
    found = model.generate(input_ids=ids, num_beams=3, max_new_tokens=5, min_new_tokens=5)
    assert found.shape == (1, 6)
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.isfinite(loss)


def test_an_adapter_folder_is_replaced_only_when_asked(tmp_path):
    one, two = (PromptTuning(num_virtual_tokens=2).build(spec("llama", 3), seed=s) for s in (0, 1))
    folder = write_peft(tmp_path / "a", one)
    with pytest.raises(DuplicatePromptError, match="overwrite=True"):
        write_peft(folder, two)
    assert torch.equal(read_peft(folder, spec("llama", 3))(), one())
    write_peft(folder, two, overwrite=True)
    assert torch.equal(read_peft(folder, spec("llama", 3))(), two())


def test_a_method_that_peft_has_not_is_refused_by_name(tmp_path):
    class Additive(PromptTuning):
        method = "additive"

    prompt = Additive(num_virtual_tokens=2).build(spec("llama", 3))
    with pytest.raises(UnsupportedError, match="no method for 'additive', expected one of prompt_tuning"):
        write_peft(tmp_path / "a", prompt)
    assert not (tmp_path / "a").exists()


def test_a_head_is_written_with_its_module(tmp_path):
    prompt = PrefixTuning(num_virtual_tokens=2).build(spec("bert", 3, causal=False), seed=0)
    prompt.head = PromptHead("classifier", {"weight": torch.randn(2, 32), "bias": torch.randn(2)})
    write_peft(tmp_path / "a", prompt, task_type="SEQ_CLS")
    model = PeftModel.from_pretrained(zoo.encoder("bert"), tmp_path / "a")
    wrapped = model.base_model.classifier.modules_to_save["default"]
    assert torch.equal(wrapped.weight, prompt.head.tensors()["weight"])
    assert torch.equal(wrapped.bias, prompt.head.tensors()["bias"])
