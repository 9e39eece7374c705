"""`fastprompt serve --engine vllm`, as people start and end it."""

import signal
import sys
from pathlib import Path

import pytest
from vllm_cases import NAME, Served
from vllm_server import Client, free_port, processes, server_environment, wait_for

from fastprompt import PrefixTuning, PromptTuning, PTuningV2

NEW, IDS = 8, (44, 55, 66)
END_SECONDS = 300  # a machine may be busy with other things


def ask(client: Client, model: str):
    body = {"prompt": list(IDS), "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return client.post("/v1/completions", model=model, **body)


def test_a_folder_of_prompts_is_served_until_the_command_is_ended(small: Served, tmp_path, monkeypatch):
    """It exports the folder itself, leaves out what vLLM cannot hold, and draws a secret."""
    import psutil

    small.add("deep", PrefixTuning(num_virtual_tokens=20), seed=1)
    small.add("soft", PromptTuning(num_virtual_tokens=33), seed=2)
    small.add("some", PTuningV2(num_virtual_tokens=3, layers=[1]), seed=3)
    port, log = free_port(), tmp_path / "log"
    command = [str(Path(sys.executable).with_name("fastprompt")), "serve", "--engine", "vllm"]
    command += ["--backbone", str(small.backbone), "--prompts", str(small.prompts), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--kv-bytes", "32M", "--max-rows", "8"]
    command += ["--", "--enforce-eager", "--block-size=32"]
    variables = server_environment()
    del variables["FASTPROMPT_VLLM_SECRET"]
    with processes([(command, variables, log)]) as (running,):
        wait_for(port, [running], [log])
        client = Client(port)
        for name in ("deep", "soft", None):
            answer = ask(client, name or NAME)
            assert answer.status == 200, answer
            assert answer["choices"][0]["token_ids"] == small.expected([(name, IDS)], NEW)[0]
        for name in ("nobody", "some"):
            answer = ask(client, name)
            assert (answer.status, answer["error"]["code"]) == (404, "model_not_found")
        children = psutil.Process(running.pid).children(recursive=True)
        assert children  # the engine at least
        running.send_signal(signal.SIGTERM)
        assert running.wait(END_SECONDS) == 0, log.read_text()[-4000:]
        _, left = psutil.wait_procs(children, END_SECONDS)
        assert not left
    assert "not served: prompt 'some' has a prefix in some layers only" in log.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--", "--api-key=x"], "--api-key cannot be given to vLLM"),
        (
            ["--", "--kv_transfer_config.kv_role=kv_both"],
            "--kv_transfer_config.kv_role cannot be given to vLLM",
        ),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--host", "0.0.0.0"], "there are no keys: anybody who reaches it"),
    ],
)
def test_what_is_wrong_is_said_and_ends_it(small: Served, tmp_path, options, said):
    import subprocess

    small.add("deep", PrefixTuning(num_virtual_tokens=2))
    command = [str(Path(sys.executable).with_name("fastprompt")), "serve", "--engine", "vllm"]
    command += ["--backbone", str(small.backbone), "--prompts", str(small.prompts), *options]
    done = subprocess.run(command, env=server_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("plugins", "said"), [("fastprompt", "--grpc starts a server that knows no plugins"), ("other", "VLLM_PLUGINS")]
)
def test_a_server_that_would_look_at_no_keys_is_not_started(monkeypatch, capsys, plugins, said):
    from fastprompt.integrations.vllm.command import main

    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert main(["a-model", "--grpc"]) == 1
    assert said in capsys.readouterr().err
