"""`/v1/completions` against answers that can be foretold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving.http.fakes import expected

from fastprompt.errors import BankFullError, IncompatiblePromptError, PromptFileError
from fastprompt.serving.engine import StepError
from fastprompt.serving.http import Options
from fastprompt.serving.request import RowFailedError, SamplingParams

URL = "/v1/completions"


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, whose end was marked."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_a_text_under_a_prompt(client, tokenizer):
    answer = client.post(URL, json={"model": "ada", "prompt": "fistan =", "max_tokens": 9}).json()
    ids = tokenizer("fistan =").input_ids
    assert answer["object"] == "text_completion" and answer["model"] == "ada" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["text"] == tokenizer.decode(expected("ada", ids, 9), skip_special_tokens=True)
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 9, "total_tokens": len(ids) + 9}


def test_the_backbone_under_its_own_name_has_no_prompt(client, engine):
    client.post(URL, json={"model": "backbone", "prompt": "a", "max_tokens": 1})
    assert engine.seen[-1].prompt is None
    client.post(URL, json={"model": "bob", "prompt": "a", "max_tokens": 1})
    assert engine.seen[-1].prompt == "bob"


@pytest.mark.parametrize(
    "prompt", [["one", "two words", "one"], [[5, 6, 7], [8], [5, 6, 7]], ["only"], [[9, 9]]], ids=str
)
def test_several_texts_with_several_choices(client, tokenizer, prompt):
    answer = client.post(URL, json={"model": "eve", "prompt": prompt, "max_tokens": 5, "n": 2}).json()
    texts = [tokenizer(p).input_ids if isinstance(p, str) else p for p in prompt]
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(prompt)))
    for choice in answer["choices"]:
        text, which = divmod(choice["index"], 2)
        assert choice["text"] == tokenizer.decode(expected("eve", texts[text], 5, which), skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert answer["usage"]["completion_tokens"] == 5 * 2 * len(prompt)


def test_token_ids_are_one_text(client, engine):
    assert client.post(URL, json={"model": "ada", "prompt": [5, 6, 7]}).status_code == 200
    assert list(engine.seen[-1].token_ids) == [5, 6, 7] and engine.seen[-1].params.max_tokens == 16


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    body = {"model": "ada", "prompt": ["x", "yy"], "max_tokens": 12, "n": n, "logprobs": 2}
    whole = client.post(URL, json=body).json()
    response = client.post(URL, json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    joined: dict[int, dict[str, Any]] = {}
    for event in events(response.text):
        assert "usage" not in event and event["object"] == "text_completion"
        for choice in event["choices"]:
            made = joined.setdefault(choice["index"], {"text": "", "tokens": [], "offsets": [], "finish": None})
            assert made["finish"] is None  # nothing follows the end
            made["text"] += choice["text"]
            made["tokens"] += choice["logprobs"]["tokens"]
            made["offsets"] += choice["logprobs"]["text_offset"]
            made["finish"] = choice["finish_reason"]
    for choice in whole["choices"]:
        assert joined[choice["index"]] == {
            "text": choice["text"],
            "tokens": choice["logprobs"]["tokens"],
            "offsets": choice["logprobs"]["text_offset"],
            "finish": "length",
        }


def test_usage_in_a_stream(client):
    body = {"model": "ada", "prompt": [5, 6], "max_tokens": 4, "stream": True}
    *chunks, last = events(client.post(URL, json=body | {"stream_options": {"include_usage": True}}).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_stop_strings_and_stop_tokens(client, tokenizer):
    tokens = expected("ada", [5, 6], 16)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    stop = text[5:8]
    [choice] = client.post(URL, json={"model": "ada", "prompt": [5, 6], "stop": stop}).json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    body = {"model": "ada", "prompt": [5, 6], "stop_token_ids": [tokens[3]]}
    answer = client.post(URL, json=body).json()
    assert answer["choices"][0]["stop_reason"] == tokens[3] and answer["usage"]["completion_tokens"] == 3


def test_logprobs(client, tokenizer):
    body = {"model": "ada", "prompt": [5, 6], "max_tokens": 6, "logprobs": 2}
    [choice] = client.post(URL, json=body).json()["choices"]
    logprobs, tokens = choice["logprobs"], expected("ada", [5, 6], 6)
    assert logprobs["token_logprobs"] == [-1.5] * 6
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(logprobs["top_logprobs"]) == 6
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(6)]
    for token, said, best in zip(tokens, logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        piece = tokenizer.decode([token])
        assert said == piece or said.startswith("bytes:\\x")
        assert best[said] == -1.5 and 1 <= len(best) <= 2


def test_every_field_reaches_the_engine(client, engine):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1.0,
        "frequency_penalty": 2, "seed": -3, "min_tokens": 2, "ignore_eos": True, "n": 2,
    }  # fmt: skip
    more = {"stop": ["zzz", "yyy"], "stop_token_ids": [1, 2], "logit_bias": {"5": -100, "12": 1.5}, "logprobs": 1}
    ignored = {"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "best_of": 2, "echo": False}
    body = {"model": "ada", "prompt": "x", "max_tokens": 3, **fields, **more, **ignored, "suffix": None, "stop": "zzz"}
    assert client.post(URL, json=body).status_code == 200
    want = SamplingParams(
        max_tokens=3, stop=("zzz",), stop_token_ids=(1, 2), logit_bias={5: -100.0, 12: 1.5}, logprobs=1, **fields
    )
    assert engine.seen[-1].params == want
    client.post(URL, json={"model": "ada", "prompt": "x", "top_k": -1, "temperature": None, "stop": None, "n": None})
    assert engine.seen[-1].params == SamplingParams()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"stop": ["x" * 1025]}, "stop.0"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["y" * 1000] * 1000}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": None}, None),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 20}, None),
        ({"seed": 2**64}, "seed"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"top_k": -2}, "top_k"),
        ({"nonsense": 1}, "nonsense"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_name_the_field(client, engine, change, param):
    told = error(client.post(URL, json={"model": "ada", "prompt": "x"} | change), 400)
    assert told["type"] == "invalid_request_error" and engine.seen == []
    if param is not None:
        assert told["param"] == param
    if "nonsense" in change:
        assert told["message"] == "Unrecognized request argument supplied: nonsense"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff", b'{"model": "ada", "prompt": "\\ud800"}',
        b'{"model": "ada", "prompt": "x", "temperature": NaN}', b'{"model": "ada", "prompt": "x", "user": Infinity}',
        b'{"model": "ada", "prompt": "x", "temperature": 1e999}', b'{"a":' * 5000, b"[" * 100_000,
        b'{"model": "ada", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: str(body[:40]),
)  # fmt: skip
def test_what_is_no_json(client, body):
    error(client.post(URL, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "\x7f", "application/json; a="]
)
def test_other_content_types_are_no_server_error(client, kind):
    response = client.post(URL, content=b'{"model": "ada", "prompt": "x"}', headers={"content-type": kind})
    assert response.status_code in (200, 400)


def test_unknown_models(client):
    told = error(client.post(URL, json={"model": "nobody", "prompt": "x"}), 404)
    assert told["code"] == "model_not_found" and told["param"] == "model" and "'nobody'" in told["message"]


def test_texts_that_are_too_long(client, engine):
    told = error(client.post(URL, json={"model": "ada", "prompt": [5] * 500, "max_tokens": 13}), 400)
    assert told["code"] == "context_length_exceeded" and "512" in told["message"]
    assert client.post(URL, json={"model": "ada", "prompt": [5] * 500, "max_tokens": 12}).status_code == 200
    error(client.post(URL, json={"model": "ada", "prompt": "word " * 3000}), 400)  # tokenized beside the loop


def test_what_the_engine_refuses(client):
    assert "outside" in error(client.post(URL, json={"model": "ada", "prompt": [5000]}), 400)["message"]
    assert "no tokens" in error(client.post(URL, json={"model": "ada", "prompt": ""}), 400)["message"]


def test_one_bad_text_of_several_refuses_the_request(client, engine):
    error(client.post(URL, json={"model": "ada", "prompt": [[5], [5000], [6]], "stream": True}), 400)
    assert engine.active == {}


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_full(client, engine, stream):
    engine.active = {str(i): None for i in range(64)}
    response = client.post(URL, json={"model": "ada", "prompt": "x", "stream": stream})
    told = error(response, 429)
    assert (
        told["type"] == "rate_limit_error" and told["code"] == "overloaded" and response.headers["retry-after"] == "3"
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code", "again"),  # whether OpenAI's clients are to ask again; None: as they do by the status
    [
        (PromptFileError("/srv/secret/ada/prompt.json is damaged"), 503, "prompt_unreadable", None),
        (BankFullError("/srv/secret"), 503, "prompt_too_large", "false"),
        (RowFailedError("the largest logit is nan"), 503, "prompt_unusable", "false"),
        (IncompatiblePromptError("made for another"), 400, "invalid_value", None),
        (StepError("/srv/secret"), 500, "internal_error", None),
        (ZeroDivisionError("/srv/secret"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_a_row(client, engine, raised, status, code, again, stream):
    engine.error, engine.fail_after = raised, 0
    response = client.post(URL, json={"model": "ada", "prompt": "x", "stream": stream})
    assert response.headers.get("x-should-retry") == again
    assert error(response, status)["code"] == code and "/srv" not in response.text


def test_an_error_in_the_middle_of_a_stream(client, engine):
    engine.error, engine.fail_after = StepError("the backbone failed"), 3
    response = client.post(URL, json={"model": "ada", "prompt": "x", "stream": True})
    lines = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and "[DONE]" not in response.text
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "internal_error"


def test_limits_are_options(client_of):
    client = client_of(options=Options(max_texts=2, max_choices=3, max_body_bytes=200))
    error(client.post(URL, json={"model": "ada", "prompt": ["a"] * 3}), 400)
    error(client.post(URL, json={"model": "ada", "prompt": ["a"] * 2, "n": 2}), 400)
    assert error(client.post(URL, json={"model": "ada", "prompt": "x" * 200}), 413)["code"] == "request_too_large"
