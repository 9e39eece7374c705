"""`fastprompt plan-capacity`: from a config alone, what the model itself would say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import zoo
from transformers import LlamaConfig
from typer.testing import CliRunner

from fastprompt.capacity import token_bytes
from fastprompt.cli import app, output
from fastprompt.cli.plan_capacity import _inspect
from fastprompt.integrations.transformers.probe import inspect_backbone


def plan(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["plan-capacity", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan-capacity", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("name", [*zoo.CAUSAL, *zoo.ENCODERS])
def test_a_config_tells_what_the_model_does(name, tmp_path):
    model = zoo.causal(name) if name in zoo.CAUSAL else zoo.encoder(name)
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"architectures": [type(model).__name__]}))
    found = _inspect(str(tmp_path / "config.json"), None)
    assert found.spec == inspect_backbone(model).spec
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_numbers_of_a_plan():
    data = plan("embedded", "--memory", "300M", "--virtual-tokens", "5, 300", "--prompts", 500, "--rate", 40)
    spec = _inspect("embedded", None).spec
    token = token_bytes(spec, 4)
    sizes = data["sizes"]
    assert sizes["token"] == token and sizes["own"] == 64 * data_row(data) * token
    assert sizes["prompts"] == int(0.9 * 300 * 2**20) - sizes["weights"] - sizes["own"]
    assert [(p["length"], p["kind"]) for p in data["plans"]] == [
        (5, "prefix"),
        (5, "embedding"),
        (300, "prefix"),
        (300, "embedding"),
    ]
    for one in data["plans"]:
        assert one["fit"] == sizes["prompts"] // (one["length"] * token)
        assert one["loads"] == pytest.approx(40 * (1 - one["hits"]["device"]))
        assert one["loaded_bytes"] == pytest.approx(one["loads"] * one["device"])
        assert one["read_bytes"] == pytest.approx(one["reads"] * one["file"])
        assert sum(one["hits"].values()) == pytest.approx(1)
    assert data["plans"][2]["hits"]["device"] < data["plans"][0]["hits"]["device"] or data["plans"][2]["fit"] >= 500


def data_row(data: dict) -> int:
    """Own tokens of a row: the embedded backbone's positions, at most 4096."""
    from fastprompt import demo

    return min(demo.backbone().config.max_position_embeddings, 4096)


def test_what_is_given_is_taken():
    given = ("--weights", "1M", "--kv-bytes", "2M", "--reserve", "0", "--dtype", "bfloat16", "--memory", "64M")
    sizes = plan("embedded", *given)["sizes"]
    assert (sizes["weights"], sizes["own"], sizes["prompts"]) == (1 << 20, 2 << 20, 61 << 20)
    assert 2 * sizes["token"] == plan("embedded", "--memory", "1G", "--rows", "1")["sizes"]["token"]


def test_the_table_fits_a_terminal(monkeypatch):
    monkeypatch.setattr(output.console, "width", 80)
    printed = CliRunner().invoke(app, ["plan-capacity", "embedded", "--memory", "1G", "--virtual-tokens", "1,20,1000"])
    assert printed.exit_code == 0, printed.output
    assert "…" not in printed.stdout and "1000" in printed.stdout and "embedding" in printed.stdout


def test_what_is_refused(tmp_path):
    assert "for prompts" in refused("embedded", "--memory", "1M")
    assert "--virtual-tokens" in refused("embedded", "--virtual-tokens", "20,x")
    assert "--dtype" in refused("embedded", "--dtype", "int8")
    assert "config.json" in refused(tmp_path / "absent")
    zoo.seq2seq("t5").save_pretrained(tmp_path)
    assert "encoder-decoder" in refused(tmp_path)


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch):
    """docs/scale.md: its command, over a config of the sizes that it names."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text()
    command = shlex.split(re.search(r"^fastprompt (plan-capacity .+)$", page, re.MULTILINE)[1])
    shown = re.search(r"^```text\n( backbone .*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    more = {"num_attention_heads": 32, "intermediate_size": 14_336, "max_position_embeddings": 8192}
    LlamaConfig(**sizes, **more, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(
        tmp_path / "my-llama"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output.console, "width", 100)
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.split() == shown.split()
