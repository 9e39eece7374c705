"""`fastprompt serve`: what it refuses, and one whole life of it over the embedded backbone."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import torch
from typer.testing import CliRunner

import fastprompt as fp
from fastprompt import demo, env
from fastprompt.cli import app
from fastprompt.cli.sizes import parse_bytes
from fastprompt.errors import ArgumentError
from fastprompt.serving.launch import EngineConfig, generates, make_engine

KEY, ADMIN = "a-key-for-the-command", "an-admin-key-for-it"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", "--backbone", "embedded", *arguments])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("FASTPROMPT_API_KEYS", raising=False)
    monkeypatch.delenv("FASTPROMPT_ADMIN_KEYS", raising=False)


def test_what_is_refused_before_anything_is_loaded(tmp_path):
    prompts = ("--prompts", str(tmp_path))
    assert "--insecure" in run(*prompts, "--host", "0.0.0.0")
    assert "cannot be read" in run(*prompts, "--keys", str(tmp_path / "absent.toml"))
    assert "--dtype" in run(*prompts, "--dtype", "float99")
    assert "--device" in run(*prompts, "--device", "nowhere")
    assert "--storage" in run(*prompts, "--storage", "int4")
    assert "--storage" in run(*prompts, "--storage", "int8", "--engine", "vllm")
    assert "--kv-bytes" in run(*prompts, "--kv-bytes", "much")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} cannot be listened at (Address already in use)" in run(*prompts, "--port", port)
    assert "nowhere.invalid" in run(*prompts, "--host", "nowhere.invalid", "--insecure")
    (tmp_path / "keys.toml").write_text("[[keys]]\nname='a'\nkey='short'\nprompts=[]\ntypo=1")
    told = run(*prompts, "--keys", str(tmp_path / "keys.toml"))
    assert "at least 16" in told and "typo" in told and "short'" not in told


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2 kb", 2048), ("3T", 3 << 40), (None, None)],
)
def test_sizes(text, number):
    assert parse_bytes("--kv-bytes", text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "1X", "1e9", "inf", "0.0G"])
def test_sizes_that_are_none(text):
    with pytest.raises(ArgumentError, match="--kv-bytes"):
        parse_bytes("--kv-bytes", text)


def test_prompts_in_eight_bits(tmp_path, monkeypatch):
    options = []
    monkeypatch.setattr("fastprompt.serving.build.build_engine", lambda *given: options.append(given[-1]))
    engine = make_engine(EngineConfig("embedded", str(tmp_path), storage="int8", host_bytes=1 << 20))
    engine._build()
    assert (options[0].storage, options[0].host_bytes) == ("int8", 1 << 20)


def test_kinds_of_backbones(tmp_path):
    import zoo

    zoo.causal("llama").save_pretrained(tmp_path / "causal")
    zoo.encoder("bert").save_pretrained(tmp_path / "encoder")
    assert generates(str(tmp_path / "causal")) and not generates(str(tmp_path / "encoder")) and generates("embedded")


def test_a_server_from_its_start_to_its_end(tmp_path):
    tokenizer = demo.tokenizer()
    model = fp.PromptedModel(demo.backbone(), tokenizer)
    torch.manual_seed(3)
    model.add_prompt("some", fp.PrefixTuning(num_virtual_tokens=5))
    model.save_prompt("some", tmp_path / "prompts" / "some")
    batch = tokenizer(["fistan =", "keville ="], return_tensors="pt")
    want = model.generate(**batch, prompts=["some", None], max_new_tokens=6, do_sample=False)[
        :, batch.input_ids.shape[1] :
    ]
    command = [
        sys.executable,
        "-m",
        "fastprompt",
        "serve",
        "--backbone",
        "embedded",
        "--prompts",
        str(tmp_path / "prompts"),
    ]
    command += ["--port", "0", "--max-rows", "4", "--max-batch-tokens", "64", "--max-model-len", "256"]
    command += [
        "--kv-bytes",
        "64M",
        "--bank-bytes",
        "16M",
        "--host-bytes",
        "16M",
        "--max-queued",
        "9",
        "--name",
        "bare",
    ]
    environment = os.environ | {"FASTPROMPT_API_KEYS": KEY, "FASTPROMPT_ADMIN_KEYS": ADMIN}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        log = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            pytest.fail("".join(log))
        with httpx.Client(base_url=found[1], headers={"authorization": f"Bearer {KEY}"}, timeout=600) as client:
            while client.get("/ready").status_code != 200:
                assert process.poll() is None
            for name, text, tokens in (("some", "fistan =", want[0]), ("bare", "keville =", want[1])):
                asked = {"model": name, "prompt": text, "max_tokens": 6, "temperature": 0}
                answer = client.post("/v1/completions", json=asked).json()
                assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert client.get("/v1/stats").status_code == 403
            administration = {"authorization": f"Bearer {ADMIN}"}
            assert client.post("/v1/prompts/some/pin", headers=administration).json()["pinned"]
            stats = client.get("/v1/stats", headers=administration).json()
            assert stats["engine"]["residency"]["device"]["promotions"] == 1
            assert stats["engine"]["residency"]["pinned"] == 1
            metrics = client.get("/metrics", headers=administration).text
            assert 'fastprompt_bank_promotions_total{tier="device"} 1.0' in metrics
            assert "fastprompt_requests_total{reason=" in metrics
            too_long = client.post("/v1/completions", json={"model": "some", "prompt": [5] * 250, "max_tokens": 6})
            assert too_long.status_code == 400  # it fits without the prompt's virtual tokens, not with them
            assert client.delete("/v1/prompts/some", headers=administration).status_code == 204
            assert client.post("/v1/completions", json={"model": "some", "prompt": "x"}).status_code == 404
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(600) == 0, rest
        assert "Traceback" not in rest, rest
    finally:
        process.kill()
        process.wait()


def test_an_engine_that_cannot_be_built_ends_the_process(tmp_path):
    told = run("--prompts", str(tmp_path), "--port", "0", "--kv-bytes", "1")
    assert "error: kv_bytes is 1" in told and "Traceback" not in told


def test_keys_of_the_environment_are_not_shown(monkeypatch):
    monkeypatch.setenv("FASTPROMPT_API_KEYS", KEY)
    assert KEY not in CliRunner().invoke(app, ["info"]).output and env.api_keys() == [KEY]
