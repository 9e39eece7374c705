"""`fastprompt export --format vllm`, and the command line of vLLM's server."""

import errno
import json
import os
import time

import pytest
import torch
import vllm_cases

from fastprompt import PrefixTuning, PromptedModel, PromptTuning, PTuningV2
from fastprompt.cli.export_vllm import export_to_vllm
from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.integrations.vllm import PrefixStore, PromptedInputs
from fastprompt.integrations.vllm.launch import VllmServer
from fastprompt.integrations.vllm.store import GRACE_SECONDS
from fastprompt.prompts import PromptHead
from fastprompt.spec import Prefix


def export(served, source=None, **options):
    backbone = str(served.backbone)
    return export_to_vllm(source or served.prompts, served.store.folder, backbone, options.get("dtype"))


def test_a_folder_is_exported_and_brought_up_to_date(small):
    small.add("deep", PrefixTuning(num_virtual_tokens=7), seed=1)
    small.add("soft", PromptTuning(num_virtual_tokens=5), seed=2)
    assert export(small)["prompts"] == 2
    deep = small.store.map(small.store.current("deep").digest)
    prefix: Prefix = small.model.library["deep"]()
    assert torch.equal(deep.keys, torch.stack(prefix.keys).transpose(1, 2).detach())
    assert torch.equal(deep.values, torch.stack(prefix.values).transpose(1, 2).detach())
    soft = small.store.map(small.store.current("soft").digest)
    compiled = small.model._info.compile([small.model.library["soft"].weights()])[0]
    assert torch.allclose(soft.keys, torch.stack(compiled.keys).transpose(1, 2), atol=1e-5)

    before = small.store._name_path("soft").stat().st_mtime_ns
    small.add("deep", PrefixTuning(num_virtual_tokens=9), seed=3, overwrite=True)
    export(small)
    assert small.store.current("deep").length == 9
    assert small.store._name_path("soft").stat().st_mtime_ns == before  # as it was: not compiled again
    small.store._prefix_path(small.store.current("soft").digest).unlink()
    export(small)
    small.store.map(small.store.current("soft").digest)
    (small.prompts / "soft").rename(small.folder / "elsewhere")
    assert export(small)["prompts"] == 1
    assert small.store.names() == ["deep"]
    (small.folder / "linked").symlink_to(small.folder / "elsewhere")
    export(small, small.folder / "linked")  # one more prompt, under its folder's name
    assert small.store.names() == ["deep", "linked"]
    small.store._name_path("deep").write_text("{")
    assert export(small)["prompts"] == 1  # the folder alone again, and what was damaged is whole
    assert small.store.names() == ["deep"] and small.store.current("deep").length == 9


def test_a_store_that_only_others_write_is_read(small, monkeypatch):
    """Such as a mount for reading: what could be removed is left to whom it belongs."""
    for seed in (1, 2):
        small.add("a", PrefixTuning(num_virtual_tokens=3), seed=seed, overwrite=True)
        export(small)
    old = time.time() - 2 * GRACE_SECONDS
    for prefix in (small.store.folder / "prefixes").iterdir():
        os.utime(prefix, (old, old))

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    assert export(small)["prompts"] == 1


def test_what_vllm_cannot_hold_is_left_out_and_said(small):
    small.add("good", PrefixTuning(num_virtual_tokens=3))
    small.add("some", PTuningV2(num_virtual_tokens=3, layers=[1]))
    small.add("head", PrefixTuning(num_virtual_tokens=3))
    small.model.library["head"].head = PromptHead("score", {"weight": torch.zeros(2, 2)})
    small.model.save_prompt("head", small.prompts / "head", overwrite=True)
    done = export(small)
    assert done["prompts"] == 1 and small.store.names() == ["good"]
    assert "in some layers only" in done["refused"]["some"]
    assert "a head of its own" in done["refused"]["head"]
    assert "a head of its own" in export(small, small.prompts / "head")["refused"]["head"]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_are_refused(name, tmp_path):
    import zoo

    model = zoo.encoder("bert") if name == "bert" else zoo.seq2seq("t5")
    model.save_pretrained(tmp_path / "backbone")
    (tmp_path / "prompts").mkdir()
    with pytest.raises(UnsupportedError, match=r"only causal decoders|no other path exists"):
        export_to_vllm(tmp_path / "prompts", tmp_path / "store", str(tmp_path / "backbone"), None)


def test_the_dtype_and_the_backbone_stay(small):
    small.add("a", PrefixTuning(num_virtual_tokens=3))
    assert export(small, dtype="bfloat16")["dtype"] == "bfloat16"
    assert small.store.map(small.store.current("a").digest).keys.dtype == torch.bfloat16
    assert export(small)["dtype"] == "bfloat16"
    for error, arguments in (
        (ArgumentError, (small.prompts, small.store.folder, str(small.backbone), "float32")),
        (ArgumentError, (small.prompts, small.store.folder, str(small.backbone), "int8")),
        (ArgumentError, (small.prompts, small.store.folder, "embedded", None)),
        (ArgumentError, (small.prompts, small.folder / "other", None, None)),
        (ArgumentError, (small.prompts, small.store.folder, str(small.folder), None)),
        (ArgumentError, (small.folder / "nothing", small.store.folder, str(small.backbone), None)),
    ):
        with pytest.raises(error):
            export_to_vllm(*arguments)


def test_another_backbones_prompts_are_refused(small, tmp_path):
    small.add("a", PrefixTuning(num_virtual_tokens=3))
    export(small)
    other = vllm_cases.Served(tmp_path / "o", PromptedModel(vllm_cases.make_backbone(tmp_path / "o", "mha")))
    other.add("b", PrefixTuning(num_virtual_tokens=3))
    refused = export_to_vllm(other.prompts, small.store.folder, str(small.backbone), None)["refused"]
    assert "made for" in refused["b"]


def test_inputs_for_the_python_interface(small, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_VLLM_SECRET", vllm_cases.SECRET)
    small.add("a", PrefixTuning(num_virtual_tokens=3))
    export(small)
    inputs = PromptedInputs(PrefixStore(small.store.folder), vllm_cases.VOCAB, {1})
    made = inputs("a", [5, 6])
    assert len(made["prompt_token_ids"]) == 5 and made["prompt_token_ids"][3:] == [5, 6]
    assert made["cache_salt"].startswith("fp1-")
    assert inputs(None, (5,)) == {"prompt_token_ids": [5]}
    with pytest.raises(ArgumentError, match="token_ids is empty"):
        inputs("a", [])


def test_the_servers_command_line(tmp_path):
    server = VllmServer("m", "n", tmp_path / "s", tmp_path / "p", dtype="bfloat16", max_rows=4, more=["--seed=1"])
    command = server.command()
    assert {"m", "--served-model-name=n", "--dtype=bfloat16", "--max-num-seqs=4", "--seed=1"} <= set(command)
    (config,) = (json.loads(a.partition("=")[2]) for a in command if a.startswith("--kv-transfer-config="))
    assert config["kv_load_failure_policy"] == "fail"
    assert config["kv_connector_extra_config"]["prompts"] == str(tmp_path / "p")
    held = server.environment({"VLLM_PLUGINS": "other", "PATH": "x"})
    assert held["VLLM_PLUGINS"] == "other,fastprompt" and len(held["FASTPROMPT_VLLM_SECRET"]) >= 32
    for more in (["--kv-transfer-config={}"], ["--enable-lora"], ["--api_key", "x"], ["--kv-transfer", "{}"]):
        with pytest.raises(ArgumentError, match=f"{more[0].partition('=')[0]} cannot be given"):
            VllmServer("m", "n", tmp_path, more=more).command()


def test_serve_refuses_options_of_the_other_engine(tmp_path):
    from fastprompt.cli.serve import serve

    for engine, option in (
        ("vllm", {"device": "cpu"}),
        ("vllm", {"bank_bytes": "1G"}),
        ("embedded", {"store": tmp_path}),
    ):
        with pytest.raises(ArgumentError, match=f"no option of --engine {engine}"):
            serve("m", tmp_path, engine=engine, **option)
    with pytest.raises(ArgumentError, match="expected 'embedded' or 'vllm'"):
        serve("m", tmp_path, engine="trt")
