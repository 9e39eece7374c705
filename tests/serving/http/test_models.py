"""`/v1/models`: what can be named, in pages."""

from __future__ import annotations

from typing import Any

from serving.http.test_completions import error

from fastprompt.serving.http import Options


def names(answer: Any) -> list[str]:
    return [model["id"] for model in answer.json()["data"]]


def test_the_backbone_and_its_prompts(client):
    answer = client.get("/v1/models")
    assert names(answer) == ["backbone", "ada", "bob", "eve"] and answer.json()["has_more"] is False
    for model in answer.json()["data"]:
        assert set(model) == {"id", "object", "created", "owned_by", "root", "parent"} and model["root"] == "backbone"
    assert answer.json()["data"][1]["created"] > 1_600_000_000


def test_no_prompt_is_read_to_be_listed(client, engine, monkeypatch):
    """Whoever lists a hundred thousand takes no time of others: the files' times are enough."""
    monkeypatch.setattr("fastprompt.serving.versions.describe", None)
    answer = client.get("/v1/models")
    assert names(answer) == ["backbone", "ada", "bob", "eve"]
    assert all(model["created"] > 1_600_000_000 for model in answer.json()["data"][1:])


def test_one_model(client, engine):
    assert client.get("/v1/models/ada").json()["id"] == "ada"
    assert client.get("/v1/models/backbone").json()["parent"] is None
    assert error(client.get("/v1/models/nobody"), 404)["code"] == "model_not_found"
    engine.name = "some/backbone"
    assert client.get("/v1/models/some/backbone").json()["id"] == "some/backbone"
    assert client.get("/v1/models/some%2Fbackbone").json()["id"] == "some/backbone"


def test_thousands_come_in_pages(client_of, engine, folder):
    for i in range(2500):
        (folder / f"p{i:05d}").mkdir()  # listed by name; files are read only when asked for
    engine.registry.refresh()
    client = client_of(options=Options(page=1000, max_page=2000))
    seen: list[str] = []
    after, pages = None, 0
    while True:
        answer = client.get("/v1/models", params={} if after is None else {"after": after})
        seen += names(answer)
        pages += 1
        if not answer.json()["has_more"]:
            break
        after = answer.json()["last_id"]
    assert pages == 3 and seen == ["backbone", "ada", "bob", "eve", *(f"p{i:05d}" for i in range(2500))]
    assert len(names(client.get("/v1/models?limit=5000"))) == 2000
    assert names(client.get("/v1/models?limit=1")) == ["backbone"]
    assert names(client.get("/v1/models?limit=2&after=bob")) == ["eve", "p00000"]
    assert error(client.get("/v1/models?limit=0"), 400)["param"] == "limit"
    assert error(client.get("/v1/models?limit=x"), 400)["param"] == "limit"


def test_a_prompt_named_as_the_backbone_is_the_backbone(client, engine, folder, files):
    engine.name = "bob"
    assert names(client.get("/v1/models")) == ["bob", "ada", "eve"]
    client.post("/v1/completions", json={"model": "bob", "prompt": "x"})
    assert engine.seen[-1].prompt is None
