"""Thousands of requests that are wrong in every way: never a server error, never a request left open."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from fastprompt.serving.http import Options, create_app

VALID = {
    "/v1/completions": {
        "model": "ada", "prompt": "some text", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1,
        "stop": ["zz"], "seed": 1, "stream": False, "logprobs": 1, "logit_bias": {"5": 1}, "stop_token_ids": [3],
        "top_k": 3, "stream_options": None, "min_p": 0.1, "user": "u",
    },
    "/v1/chat/completions": {
        "model": "ada", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "logprobs": True,
        "top_logprobs": 1, "stream": True, "stream_options": {"include_usage": True}, "response_format": None,
    },
}  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    "", "x", "\x00", "\ud800", "\U0001f4a9", "é" * 500, "x" * 20_000, "5", "NaN", [], [[]], [[[]]], [None], [1, "a"],
    ["a", 1], [1] * 600, ["x"] * 200, [[5000]], [[-1]], {}, {"": None}, {"a": {"b": {}}}, {"5": float("nan")},
    {"type": "text"}, [{}], [{"role": "user"}], [{"role": "user", "content": None}], "ada",
    "backbone", "../ada", "a/b", ".", "*",
]  # fmt: skip


def mutated(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A value with something in it replaced, removed or added."""
    if depth > 3 or rng.random() < 0.02 or not isinstance(value, (dict, list)):
        return rng.choice(STRANGE)
    if isinstance(value, dict):
        made = dict(value)
        if not made or rng.random() < 0.15:
            made[rng.choice(["extra", "", "model", "prompt", "\x00", "n" * 300])] = rng.choice(STRANGE)
        else:
            name = rng.choice(list(made))
            if rng.random() < 0.2:
                del made[name]
            else:
                made[name] = mutated(rng, made[name], depth + 1)
        return made
    made_list = list(value)
    made_list.insert(rng.randrange(len(made_list) + 1), rng.choice(STRANGE))
    return made_list


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut, changed or doubled somewhere."""
    at = rng.randrange(len(content) + 1)
    ways = [
        content[:at],
        content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
        content[:at] * 2,
        content[at:],
    ]
    return rng.choice(ways)


def fuzzed(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    path = rng.choice(list(VALID))
    body: Any = VALID[path]
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        body = mutated(rng, body)
    content = json.dumps(body).encode()
    if rng.random() < 0.1:
        content = damaged(rng, content)
    kind = rng.choice(["application/json"] * 8 + ["text/plain", "multipart/form-data", "application/json; charset=x"])
    return path, content, {"content-type": kind}


def test_bodies_of_every_kind(engine):
    """Bounded, seeded: a failure names the body that it takes."""
    count = 10_000
    rng = random.Random(20240604 + count)

    async def main() -> dict[int, int]:
        await engine.start()
        app, seen = create_app(engine), dict[int, int]()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for number in range(count):
                path, content, headers = fuzzed(rng)
                answer = await asyncio.wait_for(client.post(path, content=content, headers=headers), 300)
                assert answer.status_code in (200, 400, 404), (number, content[:300], answer.text)
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert engine.active == {} and app.state.server.active == 0
        return seen

    seen = asyncio.run(main())
    assert seen[200] > count / 10 and seen[400] > count / 3 and seen[404] > count / 300  # all kinds were reached


def many_fields(count: int) -> bytes:
    return json.dumps({f"f{i}": 1 for i in range(count)} | VALID["/v1/completions"]).encode()


HEAVY = {
    "a million of wrong items": json.dumps({"model": "ada", "prompt": [None] * 500_000}).encode(),
    "a million of texts": json.dumps({"model": "ada", "prompt": ["a"] * 700_000}).encode(),
    "a million of tokens, then a text": json.dumps({"model": "ada", "prompt": [1] * 1_000_000 + ["a"]}).encode(),
    "a million of lists": json.dumps({"model": "ada", "prompt": [[]] * 1_000_000}).encode(),
    "half a million of fields": many_fields(300_000),
    "fields of a message": json.dumps({"model": "ada", "messages": [{f"f{i}": 1 for i in range(300_000)}]}).encode(),
    "messages": json.dumps({"model": "ada", "messages": [{}] * 1_000_000}).encode(),
    "biases": json.dumps({"model": "ada", "prompt": "x", "logit_bias": {str(i): "x" for i in range(200_000)}}).encode(),
    "stops": json.dumps({"model": "ada", "prompt": "x", "stop": [""] * 1_000_000}).encode(),
    "a long text": json.dumps({"model": "ada", "prompt": "x" * 4_000_000}).encode(),
    "a long number": b'{"model": "ada", "prompt": "x", "seed": ' + b"9" * 4_000_000 + b"}",
    "deep": b'{"model":' + b"[" * 4_000_000,
}


@pytest.mark.parametrize("what", HEAVY)
def test_bodies_that_are_as_large_as_they_may_be_cost_little(client, what):
    path = "/v1/chat/completions" if "message" in what else "/v1/completions"
    client.post(path, json={})
    began = time.process_time()
    response = client.post(path, content=HEAVY[what], headers={"content-type": "application/json"})
    spent = time.process_time() - began
    assert response.status_code == 400 and len(response.content) < 5000, response.text[:300]
    assert spent < 5.0, spent  # of this process's time; far more without bounds on what is told


def test_the_openapi_page(engine):
    """Schemathesis makes requests of the page's own schemas, right ones and wrong ones."""

    async def start() -> None:
        await engine.start()

    asyncio.run(start())
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, options=Options(stall_seconds=600)))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/completions", "/v1/prompts/{name}", "/metrics"}
    for operation in operations:
        positive = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        negative = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=60 if "completions" in operation.path else 12,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(positive, negative) if operation.method.upper() != "GET" else positive)
        def check(case: Any) -> None:
            response = case.call()
            assert response.status_code < 500 or response.status_code == 503, (case.body, response.text)
            if response.status_code != 503:
                case.validate_response(response, checks=[not_a_server_error])

        check()
    assert engine.active == {}
