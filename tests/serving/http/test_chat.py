"""`/v1/chat/completions`: the template, the forms of whole and streamed answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from serving.http.fakes import TEMPLATE, expected
from serving.http.test_completions import error, events

URL = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
TEXT = "system: be brief\nuser: hello\nassistant:"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "ada", "messages": MESSAGES, "max_tokens": 6} | fields


def test_a_chat(client, engine, tokenizer):
    answer = client.post(URL, json=body()).json()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert list(engine.seen[-1].token_ids) == ids
    [choice] = answer["choices"]
    text = tokenizer.decode(expected("ada", ids, 6), skip_special_tokens=True)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert answer["object"] == "chat.completion" and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 6, "total_tokens": len(ids) + 6}


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    asked = body(n=n, logprobs=True, top_logprobs=2)
    whole = client.post(URL, json=asked).json()
    streamed = events(client.post(URL, json=asked | {"stream": True, "stream_options": {"include_usage": True}}).text)
    assert streamed[-1]["choices"] == [] and streamed[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for event in streamed for c in event["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""} and parts[0]["finish_reason"] is None
        assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
        assert [t for p in parts if p["logprobs"] for t in p["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == ["length"]
    assert {event["object"] for event in streamed} == {"chat.completion.chunk"}


def test_logprobs_have_bytes(client, tokenizer):
    [choice] = client.post(URL, json=body(logprobs=True, top_logprobs=3)).json()["choices"]
    content = choice["logprobs"]["content"]
    data = bytes(byte for token in content for byte in token["bytes"])
    assert data.decode(errors="replace") == choice["message"]["content"]
    assert all(token["logprob"] == -1.5 and len(token["top_logprobs"]) == 3 for token in content)


def test_parts_of_a_message_are_joined(client, engine):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    client.post(URL, json=body(messages=[MESSAGES[0], {"role": "user", "content": parts}]))
    client.post(URL, json=body())
    assert engine.seen[-1].token_ids == engine.seen[-2].token_ids


def test_without_a_limit_the_answer_takes_what_is_left(client, engine):
    for model, virtual in (("ada", 3), ("backbone", 0)):
        asked = body(model=model)
        del asked["max_tokens"]
        assert client.post(URL, json=asked).status_code == 200
        generation = engine.seen[-1]
        assert generation.params.max_tokens == 512 - len(generation.token_ids) - virtual
    client.post(URL, json=body(max_completion_tokens=9))
    assert engine.seen[-1].params.max_tokens == 9


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": "x", "extra": 1}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "user", "content": "x"}] * 1025},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"top_logprobs": 2},
        {"logprobs": 1},
        {"logprobs": True, "top_logprobs": 21},
        {"prompt": "x"},
        {"max_tokens": 600},
        {"messages": [{"role": "user", "content": "word " * 4000}]},
    ],
    ids=lambda change: str(change)[:50],
)
def test_refusals(client, engine, change):
    assert error(client.post(URL, json=body() | change), 400)["type"] == "invalid_request_error"
    assert engine.seen == []


def test_what_changes_nothing_is_taken(client):
    neutral = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "parallel_tool_calls": True, "reasoning_effort": None, "user": "u", "logprobs": False,
    }  # fmt: skip
    assert client.post(URL, json=body(**neutral)).status_code == 200


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{% broken", "refuses these messages"),
    ],
)
def test_templates_that_refuse(client, engine, tokenizer, template, said):
    engine.tokenizer = copy.copy(tokenizer)
    engine.tokenizer.chat_template = template
    told = error(client.post(URL, json=body()), 400)
    assert said in told["message"] and told["param"] == "messages"
    assert tokenizer.chat_template == TEMPLATE


def test_by_default_an_answer_is_as_long_as_there_is_room(client, engine, tokenizer, monkeypatch):
    """A row's positions bound it, and the memory of the server."""
    length = len(tokenizer(TEXT, add_special_tokens=False).input_ids)
    open_ended = {"model": "ada", "messages": MESSAGES, "stream": False}
    for room in (engine.limits.room, lambda virtual: 60):
        monkeypatch.setattr(type(engine.limits), "room", lambda self, virtual, room=room: room(virtual))
        answer = client.post(URL, json=open_ended)
        assert answer.status_code == 200, answer.text
        virtual = engine.registry.current("ada").length
        assert engine.seen[-1].params.max_tokens == room(virtual) - length
    told = error(client.post(URL, json=body(max_tokens=60)), 400)
    assert told["code"] == "context_length_exceeded"
