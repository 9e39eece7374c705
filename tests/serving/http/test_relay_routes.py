"""Where the face before several servers sends a request, and what it may do again."""

from __future__ import annotations

import json

import pytest

from fastprompt.serving.relay.routes import route


@pytest.mark.parametrize(
    ("method", "path", "key", "repeat"),
    [
        ("GET", "/v1/models", "", True),
        ("GET", "/v1/models/ada", "ada", True),
        ("GET", "/v1/models/backbone", "", True),
        ("POST", "/v1/prompts/a%20b/pin", "a b", True),
        ("PUT", "/v1/prompts/ada", "ada", False),
        ("DELETE", "/v1/prompts/ada", "ada", False),
        ("GET", "/health", "", True),
        ("POST", "/v1/completions", "", True),
    ],
)
def test_routes_by_path(method, path, key, repeat):
    found = route(method, path, b"{not json", "backbone")
    assert (found.key, found.repeat, found.resume, found.body) == (key, repeat, False, b"{not json")


@pytest.mark.parametrize(
    ("fields", "key", "resume", "seeded"),
    [
        ({"model": "ada"}, "ada", False, False),
        ({"model": "backbone"}, "", False, False),
        ({"model": 7, "stream": True}, "", False, False),
        ({"model": "ada", "stream": True, "temperature": 0}, "ada", True, False),
        ({"model": "ada", "stream": True, "temperature": 1, "seed": 3}, "ada", True, False),
        ({"model": "ada", "stream": True, "prompt": [5, 6]}, "ada", True, True),
        ({"model": "ada", "stream": True, "messages": []}, "ada", True, True),
        ({"model": "ada", "stream": True, "prompt": ["a", "a"]}, "ada", False, False),
        ({"model": "ada", "stream": True, "temperature": 0, "logprobs": 0}, "ada", False, False),
        ({"model": "ada", "stream": True, "temperature": 0, "logprobs": False}, "ada", True, False),
    ],
)
def test_routes_by_body(fields, key, resume, seeded):
    body = json.dumps(fields).encode()
    found = route("POST", "/v1/chat/completions", body, "backbone")
    assert (found.key, found.repeat, found.resume) == (key, True, resume)
    if seeded:
        assert json.loads(found.body) == fields | {"seed": json.loads(found.body)["seed"]}
    else:
        assert found.body == body


@pytest.mark.parametrize("body", [b"[]", b"3", b"[" * 100_000, b'{"model": "\xff"}', b""])
def test_routes_of_bodies_that_are_none(body):
    assert route("POST", "/v1/completions", body, "backbone").key == ""
