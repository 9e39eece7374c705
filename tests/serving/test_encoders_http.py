"""Classification, tagging and embeddings over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from encoder_tools import TOKENIZER, classifier, engine, tagger
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from task_tools import bert

import fastprompt as fp
from fastprompt.model import PromptedModel
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.encoder_texts import PART, Texts
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.registry import PromptRegistry
from fastprompt.store import save_prompt

TEXTS = ["jim flew to paris", "a great movie", "the the the dog sat on the mat , not the cat ."]


@contextmanager
def client_of(model: PromptedModel, folder: Path, prompts: Any, access: Access | None = None) -> Iterator[TestClient]:
    for name, prompt in prompts.items():
        save_prompt(folder / name, prompt)
    served = engine(model, PromptRegistry(folder, model._info.spec), max_wait=0.002, max_queued=4096)
    with TestClient(create_app(served, access)) as client:
        while client.get("/ready").status_code != 200:
            pass
        yield client


@pytest.fixture(scope="module")
def model() -> PromptedModel:
    return classifier()[0]


@pytest.fixture(scope="module")
def client(model: PromptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    prompts = {name: model.library[name] for name in model.prompt_names}
    with client_of(model, tmp_path_factory.mktemp("prompts"), prompts) as client:
        yield client


@torch.no_grad()
def logits(model: PromptedModel, text: str, prompt: str | None) -> torch.Tensor:
    return model(**TOKENIZER(text, return_tensors="pt"), prompts=[prompt]).logits[0]


def test_classify_answers_labels_with_probabilities(client: TestClient, model: PromptedModel):
    reply = client.post("/v1/classify", json={"model": "topic", "input": TEXTS, "top_k": 3, "raw_logits": True})
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER(t)["input_ids"]) for t in TEXTS)
    labels = model.library["topic"].labels
    for i, (text, found) in enumerate(zip(TEXTS, answer["data"], strict=True)):
        expected = logits(model, text, "topic")
        assert found["index"] == i and found["classes"] == list(labels)
        np.testing.assert_allclose(found["logits"], expected.numpy(), rtol=1e-5, atol=1e-5)
        best = expected.softmax(-1).sort(descending=True)
        assert [e["label"] for e in found["labels"]] == [labels[j] for j in best.indices[:3]]
        np.testing.assert_allclose([e["probability"] for e in found["labels"]], best.values[:3].numpy(), rtol=1e-4)
        assert found["label"] == found["labels"][0]["label"]


def test_strings_ids_and_the_bare_backbone(client: TestClient, model: PromptedModel):
    ids = TOKENIZER(TEXTS[0])["input_ids"]
    answers = [client.post("/v1/classify", json={"model": m, "input": i}).json() for m in ("bert", "tone")
               for i in (TEXTS[0], ids, [ids], [TEXTS[0]])]  # fmt: skip
    for some in (answers[:4], answers[4:]):
        assert all(a["data"] == some[0]["data"] for a in some) and len(some[0]["data"][0]["labels"]) == 2
    assert answers[0]["version"] is None and answers[4]["version"] is not None
    assert {e["label"] for e in answers[4]["data"][0]["labels"]} == {"bad", "good"}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "tone"}, 400, "input"),
        ({"model": "tone", "input": ""}, 400, "input"),
        ({"model": "tone", "input": []}, 400, "input"),
        ({"model": "tone", "input": [[]]}, 400, "input"),
        ({"model": "tone", "input": ["a", [5]]}, 400, "input"),
        ({"model": "tone", "input": [5, 10**6]}, 400, "token id"),
        ({"model": "tone", "input": "dog " * 500}, 400, "at most 59"),
        ({"model": "tone", "input": ["a"] * 2049}, 400, "split"),
        ({"model": "tone", "input": "a", "top_k": 0}, 400, "top_k"),
        ({"model": "tone", "input": "a", "more": 1}, 400, "more"),
        ({"model": "absent", "input": "a"}, 404, "absent"),
        ({"model": "../tone", "input": "a"}, 404, "tone"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client: TestClient, body: dict[str, Any], status: int, said: str):
    reply = client.post("/v1/classify", json=body)
    assert reply.status_code == status and said in reply.json()["error"]["message"]


def test_a_text_that_is_far_too_long_is_not_tokenized(client: TestClient):
    reply = client.post("/v1/classify", json={"model": "tone", "input": ["dog", "dog " * 10**6]})
    assert reply.status_code == 400 and "4000000 characters, expected at most 65536" in reply.json()["error"]["message"]
    body = {"model": "tone", "input": ["dog " * 10**6, "a cat"], "truncate": True}
    data = client.post("/v1/classify", json=body).json()["data"]
    for i, text in enumerate(("dog " * 100, "a cat")):
        one = client.post("/v1/classify", json=body | {"input": text}).json()["data"][0]
        np.testing.assert_allclose(data[i]["labels"][0]["probability"], one["labels"][0]["probability"], rtol=1e-5)


def test_requests_take_turns_at_the_tokenizer():
    order: list[str] = []

    def tokenizer(texts: list[str], **options: Any) -> list[str]:
        order.extend(text[0] for text in texts)
        return texts

    async def use() -> None:
        with ThreadPoolExecutor(1) as thread:
            shared = Texts(tokenizer, thread, 512)
            many, one = await asyncio.gather(shared.encode(["a" * PART] * 20), shared.encode(["b"]))
        assert [len(part) for part in many] == [1] * 20 and one == [["b"]]

    asyncio.run(use())
    assert order.index("b") == 1


def test_truncate_leaves_room_for_the_prompt(client: TestClient, model: PromptedModel):
    body = {"model": "long", "input": "dog " * 500, "truncate": True}
    answer = client.post("/v1/classify", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 64 - 23


def test_a_prompt_that_leaves_no_room_for_any_text(client: TestClient, model: PromptedModel):
    """Longer than the backbone has positions: a request under it is wrong, cut or not."""
    registry = client.app.state.server.engine.registry  # type: ignore[attr-defined]
    registry.put("whole", prompt_files(fp.PTuningV2(num_virtual_tokens=70).build(model._info.spec)))
    for truncate in (False, True):
        reply = client.post("/v1/classify", json={"model": "whole", "input": "a dog", "truncate": truncate})
        assert reply.status_code == 400 and "no text fits under this prompt" in reply.json()["error"]["message"]


def test_a_prompt_whose_numbers_overflow_is_not_asked_for_again(model: PromptedModel, tmp_path: Path):
    huge = model.library["tone"].collapse()
    with torch.no_grad():
        for parameter in huge.parameters():
            parameter.fill_(3e38)
    with client_of(model, tmp_path, {"huge": huge}) as client:
        reply = client.post("/v1/classify", json={"model": "huge", "input": TEXTS[0]})
    assert reply.status_code == 503 and reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"]["code"] == "prompt_unusable" and "'huge'" in reply.json()["error"]["message"]


def test_other_tasks_are_refused_with_the_right_route(client: TestClient):
    reply = client.post("/v1/token-classify", json={"model": "tone", "input": "a"})
    assert reply.status_code == 400 and "/v1/classify" in reply.json()["error"]["message"]


def test_embeddings_in_openais_form(client: TestClient, model: PromptedModel):
    plain = client.post("/v1/embeddings", json={"model": "tuned", "input": TEXTS}).json()
    coded = client.post("/v1/embeddings", json={"model": "tuned", "input": TEXTS, "encoding_format": "base64"}).json()
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            output = model(**TOKENIZER(text, return_tensors="pt"), prompts="tuned", output_hidden_states=True)
        expected = torch.nn.functional.normalize(output.hidden_states[-1][0].mean(0), dim=0).numpy()
        vector = np.frombuffer(base64.b64decode(coded["data"][i]["embedding"]), "<f4")
        np.testing.assert_allclose(plain["data"][i]["embedding"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-5)
    assert plain["object"] == "list" and plain["usage"]["total_tokens"] == plain["usage"]["prompt_tokens"]
    refused = client.post("/v1/embeddings", json={"model": "tuned", "input": "a", "dimensions": 8})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"
    assert client.post("/v1/embeddings", json={"model": "tuned", "input": "a", "pooling": "max"}).status_code == 400


def test_the_official_client_gets_embeddings(client: TestClient):
    openai = pytest.importorskip("openai", reason="the official client is not installed")
    transport = httpx.ASGITransport(client.app)

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=transport) as http:
            official = openai.AsyncOpenAI(api_key="k", base_url="http://testserver/v1", http_client=http)
            return await official.embeddings.create(model="tuned", input=TEXTS)

    answer = client.portal.call(ask)  # on the server's own loop
    again = client.post("/v1/embeddings", json={"model": "tuned", "input": TEXTS}).json()
    for found, expected in zip(answer.data, again["data"], strict=True):
        np.testing.assert_allclose(found.embedding, expected["embedding"], rtol=1e-5, atol=1e-6)


def test_words_are_labelled_and_grouped(tmp_path: Path):
    model, _ = tagger()
    prompts = {name: model.library[name] for name in model.prompt_names}
    words = TEXTS[2].split()
    with client_of(model, tmp_path, prompts) as client:
        by_text = client.post("/v1/token-classify", json={"model": "places", "input": TEXTS[2]}).json()
        by_words = client.post(
            "/v1/token-classify", json={"model": "places", "words": words, "raw_logits": True}
        ).json()
        both = client.post("/v1/token-classify", json={"model": "places", "words": words, "input": "a"})
        several = client.post("/v1/token-classify", json={"model": "places", "words": [words, ["paris"]]}).json()
        stranger = client.post("/v1/classify", json={"model": "places", "input": "a"})
    assert both.status_code == 400 and stranger.status_code == 400
    found = by_words["data"][0]
    encoded = TOKENIZER(words, is_split_into_words=True)
    first = [encoded.word_ids().index(i) for i in range(len(words))]
    expected = logits(model, TEXTS[2], "places")[first]
    np.testing.assert_allclose([w["logits"] for w in found["words"]], expected.numpy(), rtol=1e-5, atol=1e-5)
    labels = model.library["places"].labels
    assert [w["label"] for w in found["words"]] == [labels[i] for i in expected.argmax(-1)]
    strip = [{k: v for k, v in w.items() if k != "logits"} for w in found["words"]]
    assert by_text["data"][0]["words"] == strip and by_text["data"][0]["spans"] == found["spans"]
    assert [len(d["words"]) for d in several["data"]] == [len(words), 1]
    for span in found["spans"]:
        assert TEXTS[2][span["start"] : span["end"]] == span["text"]
        own = [w["probability"] for w in found["words"][span["first_word"] : span["last_word"] + 1]]
        assert span["probability"] == pytest.approx(np.mean(own))


def test_regression_and_multi_label_heads(tmp_path: Path):
    for i, (options, key, function) in enumerate(
        (
            ({"num_labels": 1}, "value", lambda x: x),
            ({"num_labels": 3, "problem_type": "multi_label_classification"}, "probability", torch.sigmoid),
        )
    ):
        model = PromptedModel(bert("SequenceClassification", **options)).eval()
        with client_of(model, tmp_path / str(i), {}) as client:
            (found,) = client.post("/v1/classify", json={"model": "bert", "input": TEXTS[0]}).json()["data"]
        expected = function(logits(model, TEXTS[0], None)).sort(descending=True).values
        np.testing.assert_allclose([e[key] for e in found["labels"]], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_keys_limit_prompts_and_tokens(model: PromptedModel, tmp_path: Path):
    keys = tmp_path / "keys.json"
    keys.write_text(
        '{"keys": [{"name": "app", "key": "app-key-0123456789", "prompts": ["tone"], "tokens_per_minute": 20}]}'
    )
    prompts = {name: model.library[name] for name in ("tone", "topic")}
    with client_of(model, tmp_path / "prompts", prompts, Access(keys)) as client:
        send = lambda body: client.post(  # noqa: E731
            "/v1/classify", json=body, headers={"Authorization": "Bearer app-key-0123456789"}
        )
        assert client.post("/v1/classify", json={"model": "tone", "input": "a"}).status_code == 401
        assert send({"model": "topic", "input": "a"}).status_code == 404
        assert send({"model": "bert", "input": "a"}).status_code == 404
        bad = [send({"model": "tone", "input": [10**6] * 15}).status_code for _ in range(3)]
        assert bad == [400] * 3  # which cost nothing
        assert send({"model": "tone", "input": [7] * 15}).status_code == 200
        assert send({"model": "tone", "input": [7] * 15}).status_code == 429


def test_concurrent_clients_of_many_prompts(client: TestClient, model: PromptedModel):
    async def ask() -> list[Any]:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as http:
            names = ["bert", *model.prompt_names]
            bodies = [{"model": names[i % 5], "input": TEXTS[i % 3], "raw_logits": True} for i in range(60)]
            replies = await asyncio.gather(*(http.post("/v1/classify", json=body) for body in bodies))
            return [(body, reply.json()) for body, reply in zip(bodies, replies, strict=True)]

    for body, reply in client.portal.call(ask):
        prompt = None if body["model"] == "bert" else body["model"]
        expected = logits(model, body["input"], prompt).numpy()
        np.testing.assert_allclose(reply["data"][0]["logits"], expected, rtol=1e-5, atol=1e-5)
    stats = client.get("/v1/stats").json()["engine"]
    assert stats["waiting"] == 0 and stats["loaded"]["prompts"] == 4


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**40)
    | st.floats()
    | st.text(st.characters(exclude_categories=[])),  # half characters too
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
FIELDS = ("input", "words", "top_k", "raw_logits", "truncate", "encoding_format", "dimensions", "pooling", "normalize")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(["classify", "token-classify", "embeddings"]),
    body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    text=st.none() | st.text(max_size=40) | st.lists(st.text(max_size=9), max_size=3) | st.lists(st.integers(0, 120)),
)
def test_no_body_is_a_server_error(client: TestClient, route: str, body: dict[str, Any], text: Any):
    body = {"model": "tuned"} | body | ({} if text is None else {"input": text})
    reply = client.post(f"/v1/{route}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400) and ("data" in reply.json() or reply.json()["error"]["message"])
