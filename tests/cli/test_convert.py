"""`fastprompt import`, `export` and `inspect`."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import torch as safetensors_torch

import fastprompt as fp

IDS = torch.arange(3, 10)[None]


def prompted_logits(backbone, path):
    model = fp.PromptedModel(transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval())
    model.load_prompt("it", path)
    with torch.no_grad():
        return model(IDS, prompts="it").logits


def peft_logits(backbone, path):
    base = transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(path)).eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_import_keeps_the_logits_of_peft(run, backbone, adapter, tmp_path):
    data = json.loads(run("import", adapter, tmp_path / "ours", "--backbone", backbone, "--json").stdout)
    assert (data["format"], data["method"], data["length"], data["layers"]) == (
        "fastprompt",
        "prefix_tuning",
        4,
        [0, 1],
    )
    assert close(prompted_logits(backbone, tmp_path / "ours"), peft_logits(backbone, adapter))


def test_import_takes_the_backbone_the_adapter_names(run, fails, adapter, tmp_path):
    run("import", adapter, tmp_path / "ours")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "names no backbone" in fails("import", adapter, tmp_path / "again")


def test_export_gives_peft_what_it_reads(run, backbone, prompts, tmp_path):
    shown = run("export", prompts / "soft", tmp_path / "theirs", "--backbone", backbone).stdout
    assert "PROMPT_TUNING" in shown
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(backbone)
    assert close(prompted_logits(backbone, prompts / "soft"), peft_logits(backbone, tmp_path / "theirs"))


def test_existing_folders_are_replaced_only_when_asked(run, fails, adapter, prompts, tmp_path):
    run("import", adapter, tmp_path / "ours")
    assert "exists already" in fails("import", adapter, tmp_path / "ours")
    run("import", adapter, tmp_path / "ours", "--overwrite")
    run("export", prompts / "soft", tmp_path / "theirs")
    assert "exists already" in fails("export", prompts / "soft", tmp_path / "theirs")
    run("export", prompts / "soft", tmp_path / "theirs", "--overwrite")


def test_import_refuses_what_is_no_adapter(fails, backbone, prompts, tmp_path):
    assert "prompt folder already" in fails("import", prompts / "soft", tmp_path / "x", "--backbone", backbone)
    assert "does not exist" in fails("import", tmp_path / "absent", tmp_path / "x", "--backbone", backbone)
    assert not (tmp_path / "x").exists()


def test_export_refuses_what_peft_cannot_hold(fails, backbone, prompts, tmp_path):
    assert "PEFT's prefixes enter all" in fails("export", prompts / "deep", tmp_path / "x", "--backbone", backbone)
    assert "expected 'peft'" in fails("export", prompts / "soft", tmp_path / "x", "--format", "gguf")
    assert not (tmp_path / "x").exists()


def test_export_refuses_another_backbone(fails, prompts, tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    line = fails("export", prompts / "soft", tmp_path / "x", "--backbone", tmp_path / "gpt2")
    assert "made for llama" in line and "gpt2 (hidden 16" in line


def test_inspect_shows_both_formats_alike(run, prompts, adapter):
    ours = json.loads(run("inspect", prompts / "deep", "--json").stdout)
    theirs = json.loads(run("inspect", adapter, "--json").stdout)
    assert list(ours) == list(theirs)
    assert (ours["method"], ours["length"], ours["layers"]) == ("p_tuning_v2", 3, [1])
    assert ours["parameters"] == 3 * 2 * 16 and ours["bytes"] > 4 * ours["parameters"]
    assert (theirs["method"], theirs["length"], theirs["layers"]) == ("PREFIX_TUNING", 4, [0, 1])
    assert theirs["parameters"] == 4 * 2 * 2 * 16 and len(theirs["sha256"]) == 64


def test_inspect_shows_head_labels_and_record(run, tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    model = fp.PromptedModel(transformers.BertForSequenceClassification(config))
    prompt = model.add_prompt("mood", fp.PrefixTuning(num_virtual_tokens=2), labels=("sad", "glad", "mad"))
    prompt.record = {"steps": 7}
    model.save_prompt("mood", tmp_path / "mood")
    data = json.loads(run("inspect", tmp_path / "mood", "--json").stdout)
    assert data["head"] == {"classifier.weight": [3, 16], "classifier.bias": [3]}
    assert data["labels"] == ["sad", "glad", "mad"] and data["record"] == {"steps": 7}
    text = run("inspect", tmp_path / "mood").stdout
    assert all(word in text for word in ("classifier.weight", "glad", "record", "steps", data["sha256"][:40]))


@pytest.mark.parametrize("fmt", ["fastprompt", "peft"])
def test_inspect_refuses_damaged_files(fails, prompts, adapter, fmt):
    folder, name = (prompts / "soft", "prompt") if fmt == "fastprompt" else (adapter, "adapter_model")
    weights = folder / f"{name}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "truncated" in fails("inspect", folder)
    weights.unlink()
    (folder / f"{name}.bin").write_bytes(b"\x80")
    assert "pickle" in fails("inspect", folder, "--json")


def test_inspect_refuses_broken_metadata_and_other_folders(fails, adapter, tmp_path):
    (adapter / "adapter_config.json").write_text("{")
    assert "not JSON" in fails("inspect", adapter)
    assert "does not exist" in fails("inspect", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "prompt.json" in fails("inspect", tmp_path / "empty")


def test_an_adapter_that_says_nonsense_is_told_or_shown(fails, run, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())

    def say(content: object) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(content))

    say([])
    assert "expected an object" in fails("inspect", adapter)
    say(config | {"base_model_name_or_path": 5})
    assert "names no backbone" in fails("import", adapter, adapter / "out")
    say(config | {"num_layers": 10**12, "[/no markup]": 1})
    (adapter.parent / "[").mkdir()
    shown = run("inspect", adapter.rename(adapter.parent / "[" / "x]")).stdout
    assert str(10**12) in shown and "[/no markup]" in shown and "[/x]" in shown


def test_inspect_refuses_weights_that_are_not_finite(fails, adapter):
    safetensors_torch.save_file(
        {"prompt_embeddings": torch.full((4, 64), float("nan"))}, adapter / "adapter_model.safetensors"
    )
    assert "NaN" in fails("inspect", adapter)
