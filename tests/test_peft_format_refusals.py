"""PEFT adapter folders that cannot be read, and prompts that PEFT cannot hold: each a clear error, nothing written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, MultitaskPromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fastprompt.errors import ArgumentError, IncompatiblePromptError, PromptFileError, UnsupportedError
from fastprompt.peft_format import read_peft, write_peft
from fastprompt.prompts import PrefixTuning, PromptTuning, PTuning, PTuningV2
from fastprompt.spec import BackboneSpec, LayerShape

GQA, MHA = LayerShape(2, 8, 8), LayerShape(4, 8, 8)


def spec(model_type: str, layers: int, shape: LayerShape = MHA, causal: bool = True, seq2seq: bool = False):
    return BackboneSpec(model_type, 32, zoo.VOCAB, (shape,) * layers, causal, seq2seq)


LLAMA, T5 = spec("llama", 3, GQA), spec("t5", 3, seq2seq=True)


def peft_adapter(path: Path, config) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(zoo.causal("llama"), config).save_pretrained(path)
    return path


@pytest.fixture
def multitask(tmp_path) -> Path:
    """A llama prompt for three tasks, as files."""
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2)
    return peft_adapter(tmp_path / "m", config)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A llama prefix, as files."""
    return write_peft(tmp_path / "a", PrefixTuning(num_virtual_tokens=3).build(LLAMA, seed=0))


def change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_other_adapters_are_sent_to_peft(tmp_path):
    folder = peft_adapter(tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match=r"peft_type 'LORA', expected one of PROMPT_TUNING, P_TUNING.*with PEFT"):
        read_peft(folder, LLAMA)


@pytest.mark.parametrize(
    "other",
    [spec("llama", 4, GQA), spec("llama", 2, GQA), spec("llama", 3, MHA), spec("llama", 3, LayerShape(2, 8, 6))],
    ids=BackboneSpec.describe,
)
def test_a_prefix_of_another_backbone_is_refused_with_both_shapes(adapter, other):
    with pytest.raises(IncompatiblePromptError) as caught:
        read_peft(adapter, other)
    assert "3 layers of 2 kv heads x 8" in str(caught.value) and other.describe() in str(caught.value)


def test_an_embedding_of_another_backbone_is_refused(tmp_path):
    folder = write_peft(tmp_path / "a", PromptTuning(num_virtual_tokens=3).build(spec("llama", 3)))
    wide = BackboneSpec("wide", 64, 97, (), True)
    with pytest.raises(IncompatiblePromptError, match=r"is \[3, 32\], expected \[3, 64\]"):
        read_peft(folder, wide)


def test_a_prefix_needs_a_backbone_that_takes_one(adapter):
    with pytest.raises(UnsupportedError, match="needs attention layers"):
        read_peft(adapter, BackboneSpec("deberta", 32, 97, (), False))


def test_an_encoder_decoder_prefix_with_one_submodule_is_refused(tmp_path):
    folder = write_peft(tmp_path / "a", PrefixTuning(num_virtual_tokens=2).build(T5))
    with pytest.raises(UnsupportedError, match="num_transformer_submodules=1"):
        read_peft(change(folder, num_transformer_submodules=1), T5)


@pytest.mark.parametrize("task", [None, 3, -1, "cola"])
def test_a_task_must_be_chosen(multitask, task):
    with pytest.raises(ArgumentError, match=r"task_id is .*expected 0\.\.2.*holds 3 tasks"):
        read_peft(multitask, LLAMA, task_id=task)


def test_a_task_of_a_single_task_prompt_is_refused(adapter):
    with pytest.raises(ArgumentError, match="PREFIX_TUNING, which has no tasks"):
        read_peft(adapter, LLAMA, task_id=0)


def test_files_that_are_missing_or_pickled_are_refused(adapter, tmp_path):
    llama = LLAMA
    with pytest.raises(PromptFileError, match="does not exist"):
        read_peft(tmp_path / "nowhere", llama)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(PromptFileError, match=r"adapter_model.bin, a pickle.*only safetensors is read"):
        read_peft(adapter, llama)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(PromptFileError, match=r"has no readable adapter_model.safetensors"):
        read_peft(adapter, llama)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(PromptFileError, match="is not JSON"):
        read_peft(adapter, llama)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(PromptFileError, match="holds a list, expected an object"):
        read_peft(adapter, llama)


def test_truncated_weights_are_refused(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(PromptFileError, match="not a whole safetensors file"):
        read_peft(adapter, LLAMA)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["prompt_embeddings"].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].long()), "dtype torch.int64"),
        (lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:2]), "do not belong together"),
        (lambda t: t.update(x=t.pop("prompt_embeddings")), "has no prompt_embeddings"),
    ],
)
def test_wrong_tensors_are_refused(adapter, edit, message):
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    with pytest.raises(PromptFileError, match=message):
        read_peft(change(adapter, tensors), LLAMA)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None, expected an int"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_layers": "3"}, "num_layers is '3'"),
        ({"num_attention_heads": 3}, "do not belong together"),
        ({"num_attention_heads": 0}, "do not belong together"),
        ({"token_dim": 32}, "do not belong together"),
        ({"task_type": 5}, "task_type is 5, expected a name"),
    ],
)
def test_wrong_fields_are_refused(adapter, fields, message):
    with pytest.raises(PromptFileError, match=message):
        read_peft(change(adapter, **fields), LLAMA)


def test_weights_of_the_backbone_itself_are_refused(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.embed_tokens.weight"] = torch.zeros(97, 32)
    with pytest.raises(
        UnsupportedError, match=r"embed_tokens.weight, which is neither a prompt nor in modules_to_save"
    ):
        read_peft(change(adapter, tensors), LLAMA)


def test_multitask_factors_must_fit(multitask):
    tensors = load_file(multitask / "adapter_model.safetensors")
    change(multitask, tensors | {"prefix_task_cols": tensors["prefix_task_cols"][:, :2].contiguous()})
    with pytest.raises(PromptFileError, match="do not fit prompt_embeddings"):
        read_peft(multitask, LLAMA, task_id=0)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        (
            PTuningV2(num_virtual_tokens=2, layers=(0, 2)).build(spec("llama", 3)),
            {},
            UnsupportedError,
            r"\[0, 2\] of 3",
        ),
        (
            PTuning(num_virtual_tokens=2, in_place=True).build(spec("llama", 3)),
            {},
            UnsupportedError,
            "virtual tokens stand in place",
        ),
        (
            PrefixTuning(num_virtual_tokens=2).build(BackboneSpec("x", 8, 9, (GQA, MHA), True)),
            {},
            UnsupportedError,
            "one shape for all",
        ),
        (
            PrefixTuning(num_virtual_tokens=2).build(spec("mla", 2, LayerShape(2, 8, 6))),
            {},
            UnsupportedError,
            "one shape for all",
        ),
        (
            PrefixTuning(num_virtual_tokens=2).build(spec("bart", 3, seq2seq=True)),
            {"task_type": "CAUSAL_LM"},
            UnsupportedError,
            "task_type is not SEQ_2_SEQ_LM",
        ),
        (
            PromptTuning(num_virtual_tokens=2).build(spec("llama", 3)),
            {"task_type": "lm"},
            ArgumentError,
            "expected one",
        ),
        (
            PromptTuning(num_virtual_tokens=2).build(spec("llama", 3)),
            {"task_type": "SEQ_2_SEQ_LM"},
            ArgumentError,
            "is no encoder-decoder",
        ),
        (
            PromptTuning(num_virtual_tokens=2).build(spec("bert", 3, causal=False)),
            {"task_type": "SEQ_CLS"},
            ArgumentError,
            "set prompt.head",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_peft_cannot_hold_is_refused(prompt, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_peft(tmp_path / "a", prompt, **options)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    prompt = PromptTuning(num_virtual_tokens=2).build(spec("llama", 3))
    with torch.no_grad():
        prompt.encoder.weight[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="prompt_embeddings has 1 values that are NaN"):
        write_peft(tmp_path / "a", prompt)
    assert not list(tmp_path.iterdir())
