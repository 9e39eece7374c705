"""The Ray Serve application: two replicas on this machine, one of which is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

import fastprompt as fp
from bench import ray_replicas as replicas_of
from fastprompt import demo

pytest.importorskip("ray", reason="make test-ray")

PLAN = replicas_of.Plan(requests=80, tenants=16, clients=8, new=48, fronts=1)
LONG = {"prompt": "The capital of", "max_tokens": 150, "min_tokens": 150, "temperature": 0}


OLD, NEW = "the-key-before-0123", "the-key-after-0123"


def write_key(path, key):
    path.write_text(f'[[keys]]\nname = "one"\nkey = "{key}"\nprompts = ["*"]\n')
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    replicas_of.save_tenants(path, PLAN.tenants)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return replicas_of.tenants.answers(folder, sorted(p.name for p in folder.iterdir()), PLAN.new)


@pytest.fixture(scope="module")
def url(folder):
    with replicas_of.cluster(folder, PLAN) as address:
        yield address


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=600) as made:
        yield made


def check(phase):
    assert not phase.failed and not phase.wrong
    assert phase.requests == PLAN.requests


def test_a_tenant_has_one_replica_and_answers_are_those_of_generate(url, expected):
    phase = asyncio.run(replicas_of.ask_all(url, PLAN, expected))
    check(phase)
    assert phase.affinity() >= 0.95 and len(sum(phase.replicas.values(), Counter())) == 2


def test_a_prompt_stored_at_one_replica_is_there_at_the_others(client, folder):
    files = [("files", (p.name, p.read_bytes())) for p in (folder / "tenant-0000").iterdir()]
    for name in ("first", "second", "third", "fourth"):
        assert client.put(f"/v1/prompts/{name}", files=files).status_code == 201
    seen = Counter()
    while len(seen) < 2 or min(seen.values()) < 2:  # any replica answers; each looks every second
        answer = client.get("/v1/models")
        if {"first", "fourth"} <= {model["id"] for model in answer.json()["data"]}:
            seen[answer.headers["x-fastprompt-replica"]] += 1
    assert client.delete("/v1/prompts/first").status_code == 204
    missing = client.post("/v1/completions", json={"model": "first", "prompt": "x"})
    assert missing.status_code == 404 and len(missing.headers.get_list("x-request-id")) == 1


def test_a_client_that_goes_away_takes_its_rows_with_it(client):
    with client.stream("POST", "/v1/completions", json={"model": "embedded", "stream": True} | LONG) as response:
        next(response.iter_bytes())
        name = response.headers["x-fastprompt-replica"]
    while True:
        stats = client.get("/v1/stats")
        if stats.headers["x-fastprompt-replica"] == name and not stats.json()["engine"]["running"]:
            break


def test_a_stream_goes_on_at_another_replica(client):
    """It is killed once the stream has begun; what was sent stays, and the rest is what it would have been."""
    body = {"model": "tenant-0003", "stream": True, "stream_options": {"include_usage": True}} | LONG
    whole = client.post("/v1/completions", json={"model": "tenant-0003"} | LONG).json()
    with client.stream("POST", "/v1/completions", json=body) as response:
        name, parts = response.headers["x-fastprompt-replica"], response.iter_text()
        text = next(parts)
        os.kill(replicas_of.replicas()[name], signal.SIGKILL)
        text += "".join(parts)
    assert replicas_of._text(text, True) == whole["choices"][0]["text"]
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    assert len({event["id"] for event in events}) == 1 and events[-1]["usage"] == whole["usage"]
    replicas_of.wait_for_replicas(2, without=name)


def processes(title: bytes) -> list[int]:
    """Processes of Ray's by what they call themselves."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            if (process / "cmdline").read_bytes().startswith(b"ray::" + title):
                found.append(int(process.name))
    return found


@pytest.mark.parametrize("title", [b"ServeReplica:default:Front", b"ProxyActor"])
def test_a_front_or_the_proxy_that_dies_takes_what_it_passed_on_and_no_more(client, title):
    """Ray starts another, which finds the replicas as they were; rows that nobody waits for any more end."""
    engines = replicas_of.replicas()
    body = {"model": "tenant-0003", "stream": True} | LONG
    with client.stream("POST", "/v1/completions", json=body) as response:
        parts = response.iter_text()
        text = next(parts)
        for process in processes(title):
            os.kill(process, signal.SIGKILL)
        with contextlib.suppress(httpx.HTTPError):
            text += "".join(parts)
    assert "[DONE]" not in text
    answered = False
    while not answered:
        with contextlib.suppress(httpx.HTTPError):  # without a proxy nobody listens
            answered = client.post("/v1/completions", json={"model": "tenant-0003"} | LONG).status_code == 200
        time.sleep(0.1)
    assert replicas_of.replicas() == engines
    running = dict.fromkeys(engines, 1)
    while any(running.values()):
        stats = client.get("/v1/stats")
        running[stats.headers["x-fastprompt-replica"]] = stats.json()["engine"]["running"]


def test_no_request_fails_when_a_replica_is_killed(url, expected):
    before = asyncio.run(replicas_of.ask_all(url, PLAN, expected))
    victim = before.busiest()
    check(asyncio.run(replicas_of.ask_all(url, PLAN, expected, victim)))
    assert victim not in replicas_of.replicas()


def test_encoders_below_a_path_and_keys_that_change(url, tmp_path):
    from ray import serve
    from transformers import BertConfig, BertForSequenceClassification

    from fastprompt.integrations.ray import app

    tokenizer = demo.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    model = fp.PromptedModel(BertForSequenceClassification(config), tokenizer)
    model.add_prompt("tone", fp.PTuningV2(num_virtual_tokens=4), labels=["bad", "good"])
    model.save_prompt("tone", tmp_path / "prompts" / "tone")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    settings = {
        "backbone": str(tmp_path / "backbone"),
        "prompts": str(tmp_path / "prompts"),
        "num_replicas": "1",
        "num_fronts": "1",
        "bank_bytes": "16M",
        "keys": str(write_key(tmp_path / "keys.toml", OLD)),
        "options": {"ray_actor_options": {"num_cpus": 0}},
    }
    serve.run(app(settings), name="encoder", route_prefix="/encoder")

    def ask(key, path="classify", **asked):
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{url}/encoder/v1/{path}", json=asked, headers=headers, timeout=600)

    asked = {"model": "tone", "input": ["a b"], "raw_logits": True}
    answer = ask(OLD, **asked)
    assert answer.status_code == 200, answer.text
    assert {label["label"] for label in answer.json()["data"][0]["labels"]} == {"bad", "good"}
    assert ask(OLD, "completions").status_code == 404
    assert ask(NEW, **asked).status_code == 401
    write_key(tmp_path / "keys.toml", NEW)
    while ask(OLD, **asked).status_code != 401 or ask(NEW, **asked).status_code != 200:  # fronts and replicas look
        pass


def test_settings_that_are_wrong():
    from pydantic import ValidationError

    from fastprompt.errors import ArgumentError
    from fastprompt.integrations.ray import Settings, build_app

    with pytest.raises(ValidationError, match="typo"):
        build_app("embedded", "x", typo=1)
    with pytest.raises((ValidationError, ArgumentError), match="bank_bytes"):
        build_app("embedded", "x", bank_bytes="much")
    settings = Settings(backbone="embedded", prompts="x", kv_bytes="2M", options={"autoscaling_config": {}})
    engine = settings.absolute().engine()
    assert (engine.kv_bytes, engine.served_name) == (2 << 20, "embedded") and os.path.isabs(engine.prompts)
    assert build_app("embedded", "x") is not None
