"""Prompts on disk: byte-identical round trips, and every refusal leaving things as they were."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastprompt import store
from fastprompt.errors import ArgumentError, IncompatiblePromptError, PromptFileError
from fastprompt.prompts import Cartridge, PrefixTuning, PromptHead, PromptTuning, PTuning, PTuningV2, SoftPrompt
from fastprompt.spec import BackboneSpec, LayerShape, flatten
from fastprompt.store import inspect_prompt, load_prompt, prompt_digest, prompt_tensors, save_prompt

SPEC = BackboneSpec("llama", 12, 97, (LayerShape(2, 6, 6), LayerShape(1, 4, 3), LayerShape(2, 6, 6)), causal=True)
CONFIGS = [
    PromptTuning(num_virtual_tokens=7, init_labels=("a", "b")),
    PTuning(num_virtual_tokens=3),
    PTuning(num_virtual_tokens=3, encoder="mlp", encoder_dropout=0.5),
    PrefixTuning(num_virtual_tokens=5),
    PrefixTuning(num_virtual_tokens=5, reparameterization="mlp", hidden_size=4, dropout=0.5),
    PTuningV2(num_virtual_tokens=1, layers=(-1, 1)),
    Cartridge(num_virtual_tokens=4, num_frozen_tokens=2),
]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def make(seed: int = 0, length: int = 3) -> SoftPrompt:
    return PromptTuning(num_virtual_tokens=length).build(SPEC, seed=seed)


def output(prompt: SoftPrompt) -> torch.Tensor:
    with torch.no_grad():  # an LSTM rounds otherwise when it records gradients
        result = prompt.eval()()
    return result if isinstance(result, torch.Tensor) else flatten(result)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_save_load_save_is_byte_identical(config, tmp_path):
    prompt = config.build(SPEC, seed=0)
    prompt.head = PromptHead("classifier", {"dense.weight": torch.randn(3, 12), "out_proj.bias": torch.randn(3)})
    prompt.labels, prompt.task_type = ("no", "yes", "é"), "SEQ_CLS"
    save_prompt(tmp_path / "one", prompt, record={"steps": 10, "loss": 0.25})
    loaded = load_prompt(tmp_path / "one", SPEC)
    save_prompt(tmp_path / "two", loaded)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {"prompt.safetensors", "prompt.json"}
    assert torch.equal(output(loaded), output(prompt)) and loaded.config == config
    assert loaded.labels == prompt.labels and loaded.task_type == "SEQ_CLS" and loaded.record["steps"] == 10
    assert loaded.head.module == "classifier"
    for name, tensor in prompt.head.tensors().items():
        assert torch.equal(loaded.head.tensors()[name], tensor)
    assert all(p.requires_grad for p in loaded.parameters())
    assert prompt_digest(loaded) == prompt_digest(prompt)


def test_two_saves_of_one_prompt_are_byte_identical(tmp_path):
    prompt = make()
    save_prompt(tmp_path / "a", prompt)
    save_prompt(tmp_path / "b", prompt)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stored_tensors_have_the_documented_names_and_shapes(config, tmp_path):
    save_prompt(tmp_path / "p", config.build(SPEC, seed=0))
    shapes = {k: list(v.shape) for k, v in load_file(tmp_path / "p" / "prompt.safetensors").items()}
    length = config.num_virtual_tokens
    if config.kind == "embedding":
        assert shapes == {"embedding": [length, 12]}
        return
    expected = {}
    for i in config.prefix_layers(SPEC):
        layer = SPEC.layers[i]
        expected[f"layers.{i}.key"] = [layer.kv_heads, length, layer.key_dim]
        expected[f"layers.{i}.value"] = [layer.kv_heads, length, layer.value_dim]
    assert shapes == expected


def test_inspect_reads_no_weights(tmp_path):
    prompt = PTuningV2(num_virtual_tokens=5, layers=(0, -1)).build(SPEC, seed=0)
    save_prompt(tmp_path / "p", prompt, record={"note": "x"})
    (tmp_path / "p" / "prompt.safetensors").unlink()
    metadata = inspect_prompt(tmp_path / "p")
    assert metadata["method"] == "p_tuning_v2" and metadata["length"] == 5 and metadata["layers"] == [0, 2]
    assert metadata["record"] == {"note": "x"} and metadata["fingerprint"] == SPEC.fingerprint()
    assert metadata["backbone"]["model_type"] == "llama" and metadata["config"]["layers"] == [0, -1]


def test_the_digest_is_the_content():
    prompt, same, other = make(0), make(0), make(1)
    assert prompt_digest(prompt) == prompt_digest(same) != prompt_digest(other)
    assert prompt_digest(prompt) == prompt_digest(prompt.collapse())
    with torch.no_grad():
        same.encoder.weight[0, 0] += 1e-3
    assert prompt_digest(prompt) != prompt_digest(same)
    with_head = make(0)
    with_head.head = PromptHead("score", {"weight": torch.zeros(2, 12)})
    assert prompt_digest(prompt) != prompt_digest(with_head)
    assert set(prompt_tensors(with_head)) == {"embedding", "head.weight"}


def test_half_precision_prompts_are_stored_in_float32(tmp_path):
    prompt = make().to(torch.bfloat16)
    save_prompt(tmp_path / "p", prompt)
    assert torch.equal(load_prompt(tmp_path / "p")(), prompt().float())


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    prompt = PrefixTuning(num_virtual_tokens=3).build(SPEC, seed=0)
    prompt.head = PromptHead("score", {"weight": torch.ones(2, 12)})
    return save_prompt(tmp_path / "p", prompt)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields) -> None:
    """Alter a stored prompt as a careful forger would, with a right digest."""
    if tensors is not None:
        save_file(tensors, folder / "prompt.safetensors")
    metadata = json.loads((folder / "prompt.json").read_text())
    metadata["sha256"] = hashlib.sha256((folder / "prompt.safetensors").read_bytes()).hexdigest()
    (folder / "prompt.json").write_text(json.dumps(metadata | fields))


def test_missing_things_are_named(saved, tmp_path):
    with pytest.raises(PromptFileError, match=r"nowhere does not exist: expected a folder with prompt\.json"):
        load_prompt(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptFileError, match=r"has no readable prompt.json, only \[\]"):
        inspect_prompt(tmp_path / "empty")
    (saved / "prompt.safetensors").unlink()
    with pytest.raises(PromptFileError, match=r"has no readable prompt.safetensors, only \['prompt.json'\]"):
        load_prompt(saved)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(PromptFileError, match="PEFT adapter"):
        load_prompt(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(PromptFileError, match="is a file: expected a folder"):
        load_prompt(tmp_path / "file")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    weights = saved / "prompt.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(PromptFileError, match=r"does not match the digest.*truncated or altered"):
        load_prompt(saved)
    rewrite(saved)
    with pytest.raises(PromptFileError, match="not a whole safetensors file"):
        load_prompt(saved)


def test_one_changed_bit_is_refused(saved):
    weights = saved / "prompt.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PromptFileError, match="does not match the digest"):
        load_prompt(saved)


@pytest.mark.parametrize("name", ["prompt.bin", "prompt.pt", "prompt.pkl", "adapter_model.bin"])
def test_a_pickle_is_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "p").mkdir()
    (tmp_path / "p" / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / "p", tmp_path / "p" / name):
        with pytest.raises(PromptFileError, match=r"pickle.*only safetensors is read"):
            load_prompt(path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_right_name_is_never_opened(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (saved / "prompt.safetensors").write_bytes(pickle.dumps(Bomb()))
    rewrite(saved)
    with pytest.raises(PromptFileError, match="only safetensors is read"):
        load_prompt(saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(saved, tmp_path, value):
    tensors = load_file(saved / "prompt.safetensors")
    tensors["layers.1.value"][0, 1, 2] = value
    rewrite(saved, tensors)
    with pytest.raises(PromptFileError, match=r"layers.1.value has 1 values that are NaN or infinite"):
        load_prompt(saved)
    prompt = make()
    with torch.no_grad():
        prompt.encoder.weight[1, 2] = value
    with pytest.raises(ArgumentError, match="embedding has 1 values that are NaN or infinite"):
        save_prompt(tmp_path / "new", prompt)
    assert not (tmp_path / "new").exists()


def test_integers_are_refused(saved):
    tensors = load_file(saved / "prompt.safetensors")
    rewrite(saved, tensors | {"layers.0.key": tensors["layers.0.key"].to(torch.int32)})
    with pytest.raises(PromptFileError, match=r"layers.0.key has dtype torch.int32, expected a floating-point"):
        load_prompt(saved)


def test_half_precision_files_are_read(saved):
    expected = load_prompt(saved).weights()
    rewrite(saved, {k: v.to(torch.bfloat16) for k, v in load_file(saved / "prompt.safetensors").items()})
    assert torch.equal(load_prompt(saved).weights(), expected.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.key"), r"layers.1.key is missing, expected \[1, 3, 4\]"),
        (lambda t: t.update({"layers.9.key": torch.zeros(1)}), r"layers.9.key is \[1\], expected no such tensor"),
        (lambda t: t.update({"layers.0.key": torch.zeros(2, 4, 6)}), r"is \[2, 4, 6\], expected \[2, 3, 6\]"),
        (lambda t: t.update({"head.../../etc": torch.zeros(1)}), "head parameter is named '../../etc'"),
        (lambda t: t.pop("head.weight"), "no parameters"),
    ],
)
def test_wrong_tensors_are_refused(saved, change, message):
    tensors = load_file(saved / "prompt.safetensors")
    change(tensors)
    rewrite(saved, tensors)
    with pytest.raises(PromptFileError, match=message):
        load_prompt(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 2}, "format version 2, this fastprompt reads 1: upgrade"),
        ({"format_version": "1"}, "no format_version"),
        ({"method": "lora"}, "method is 'lora', expected one of"),
        ({"method": 3}, "field method is 3, expected str"),
        ({"config": {"num_virtual_tokens": 3, "depth": 1}}, r"no fields \['depth'\]"),
        ({"config": {"num_virtual_tokens": -3}}, "num_virtual_tokens is -3"),
        ({"config": {"num_virtual_tokens": 4}}, "disagree with its config"),
        ({"layers": [0]}, "disagree with its config"),
        ({"fingerprint": "0" * 16}, "the file was altered"),
        ({"backbone": {"model_type": "llama"}}, "field backbone is malformed"),
        ({"head_module": "../x"}, "head module is '../x'"),
        ({"labels": [1]}, r"field labels is \[1\]"),
        ({"labels": ["\ud800"]}, "half a character"),
        ({"task_type": "\ud800"}, "half a character"),
        ({"record": {"loss": float("nan")}}, "NaN is no number of JSON"),
        ({"record": []}, r"field record is \[\], expected dict or NoneType"),
    ],
)
def test_wrong_metadata_is_refused(saved, fields, message):
    rewrite(saved, **fields)
    with pytest.raises(PromptFileError, match=message):
        load_prompt(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', "\xff"])
def test_metadata_that_is_no_metadata_is_refused(saved, text):
    (saved / "prompt.json").write_bytes(text.encode("latin1"))
    with pytest.raises(PromptFileError, match=r"is not JSON|no format_version"):
        load_prompt(saved)


def test_a_prompt_of_another_backbone_is_refused_with_both_shapes(saved):
    other = BackboneSpec("qwen2", 16, 97, (LayerShape(4, 8, 8),), causal=True)
    with pytest.raises(IncompatiblePromptError) as caught:
        load_prompt(saved, other)
    for part in ("llama (hidden 12, 3 layers", "qwen2 (hidden 16, 1 layers", SPEC.fingerprint(), other.fingerprint()):
        assert part in str(caught.value)
    assert load_prompt(saved).spec == SPEC


@pytest.mark.parametrize("record", [{"a": object()}, {"loss": float("nan")}])
def test_a_record_that_is_not_json_is_refused(tmp_path, record):
    with pytest.raises(ArgumentError, match="record cannot be written as JSON"):
        save_prompt(tmp_path / "p", make(), record=record)
    assert not list(tmp_path.iterdir())


def test_the_public_names_exist():
    assert store.FORMAT_VERSION == 1 and (store.WEIGHTS, store.METADATA) == ("prompt.safetensors", "prompt.json")
