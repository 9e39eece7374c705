"""Several servers behind one face, which die while they answer."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
import pytest
from serving.http.fakes import SPEC, FakeEngine
from serving.http.streams import events, joined
from starlette.testclient import TestClient

from fastprompt.serving.http import Access, Options, create_app
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.relay import front
from fastprompt.serving.relay.inside import messages_of

HERE = ("127.0.0.1", 5000)
KEY = "a-key-long-enough"


class LostError(Exception):
    """A server has died."""


@dataclass
class Cluster:
    """Servers over one folder; `faults` says of each request how many lists of messages arrive before its server dies.

    The next one to answer is another.
    """

    engines: list[FakeEngine]
    access: Access
    faults: list[int] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self):
        self.apps = [create_app(engine, self.access) for engine in self.engines]

    async def ask(self, scope, body, key) -> AsyncGenerator:
        at = (zlib.crc32(key.encode()) + len(self.asked)) % len(self.apps) if key else 0
        self.asked.append((key, len(body)))
        left = self.faults.pop(0) if self.faults else None
        async with aclosing(messages_of(self.apps[at], scope, body)) as answer:
            async for messages in answer:
                if left is not None:
                    if not left:
                        raise LostError
                    left -= 1
                yield messages

    def client(self, options: Options | None = None, insecure: bool = False, where: tuple = HERE) -> TestClient:
        servers = front.Servers(self.ask, (LostError,), "backbone")
        return TestClient(front.Front(servers, self.access, options, insecure), "http://localhost", client=where)


@pytest.fixture
def cluster_of(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(front, "PAUSES", (0.0, 0.0, 0.0))

    def make(*faults: int, access: Access | None = None) -> Cluster:
        engines = [
            FakeEngine(tokenizer, PromptRegistry(folder, SPEC), ready=True, alive=True, pause=0.001) for _ in range(2)
        ]
        return Cluster(engines, access or Access(), list(faults))

    return make


def asking(**fields):
    return {"model": "ada", "prompt": "one two", "max_tokens": 6, "temperature": 0} | fields


def test_a_lost_answer_is_asked_for_again(cluster_of):
    want = cluster_of().client().post("/v1/completions", json=asking()).json()
    for faults in ((0,), (0, 0), (0, 0, 0)):
        cluster = cluster_of(*faults)
        answer = cluster.client().post("/v1/completions", json=asking())
        assert answer.status_code == 200 and answer.json()["choices"] == want["choices"]
        assert [key for key, _ in cluster.asked] == ["ada"] * (len(faults) + 1)
    answer = cluster_of(0, 0, 0, 0).client().post("/v1/completions", json=asking())
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}])
def test_a_stream_goes_on_where_it_stopped(cluster_of, path, sampling):
    body = asking(stream=True, n=2, stream_options={"include_usage": True}, **sampling)
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    plain = events(cluster_of().client().post(path, json=body).text)
    want = joined(plain)
    assert all(want.values())
    for first in range(12):
        answer = cluster_of(first, first // 2).client().post(path, json=body)
        found = events(answer.text)
        assert joined(found) == want, first
        assert found[-2]["usage"] == plain[-2]["usage"]


def test_a_stream_that_samples_without_a_seed_gets_one(cluster_of):
    cluster = cluster_of(3, 4)
    answer = cluster.client().post("/v1/completions", json=asking(stream=True, temperature=1.0))
    assert joined(events(answer.text))[0]
    seeds = {generation.params.seed for engine in cluster.engines for generation in engine.seen}
    assert len(seeds) == 1 and None not in seeds


def test_streams_that_cannot_go_on_say_so(cluster_of, tmp_path):
    answer = cluster_of(3).client().post("/v1/completions", json=asking(stream=True, logprobs=1))
    assert events(answer.text)[-1]["error"]["code"] == "unavailable" and "[DONE]" not in answer.text
    cluster = cluster_of(3)
    other = cluster.engines[1 - zlib.crc32(b"ada") % 2]  # where it goes then
    other.registry = PromptRegistry(tmp_path / "empty", SPEC)
    *begun, last = events(cluster.client().post("/v1/completions", json=asking(stream=True)).text)
    assert begun and begun[0]["choices"][0]["text"]
    assert last["error"]["code"] == "model_not_found" and len(cluster.asked) == 2


def test_another_answer_ends_a_stream(cluster_of, monkeypatch):
    cluster = cluster_of(3)
    run = FakeEngine._run

    async def other(self, generation):
        async for delta in run(self, generation):
            delta.tokens and object.__setattr__(delta, "text", delta.text + str(id(self) % 97))
            yield delta

    monkeypatch.setattr(FakeEngine, "_run", other)
    found = events(cluster.client().post("/v1/completions", json=asking(stream=True)).text)
    assert "differs" in found[-1]["error"]["message"]


def test_what_writes_is_sent_once(cluster_of, files, folder):
    cluster = cluster_of(0)
    answer = cluster.client().put("/v1/prompts/new", files=[("files", (n, c)) for n, c in files.items()])
    assert answer.status_code == 503 and len(cluster.asked) == 1
    answer = cluster.client().put("/v1/prompts/newer", files=[("files", (n, c)) for n, c in files.items()])
    assert answer.status_code == 201 and (folder / "newer" / "prompt.json").exists()
    for engine in cluster.engines:
        engine.registry.refresh()
    for _ in range(2):  # by either server
        assert cluster.client().post("/v1/completions", json=asking(model="newer")).status_code == 200
    assert {len(engine.seen) for engine in cluster.engines} == {1}


def test_who_may_come_in(cluster_of):
    assert cluster_of().client(where=("10.0.0.7", 1)).get("/health").json()["error"]["code"] == "foreign_client"
    assert cluster_of().client(where=("10.0.0.7", 1), insecure=True).get("/health").status_code == 200
    for foreign in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        assert cluster_of().client().get("/health", headers=foreign).json()["error"]["code"] == "foreign_host"
        assert cluster_of().client(insecure=True).get("/health", headers=foreign).status_code == 200
    cluster = cluster_of(access=Access(None, [KEY], []))
    client = cluster.client(Options(max_body_bytes=100), where=("10.0.0.7", 1))
    assert client.post("/v1/completions", json=asking()).status_code == 401
    assert cluster.asked == [("", 0)]  # nobody read the body
    known = {"authorization": f"Bearer {KEY}"}
    assert client.post("/v1/completions", json=asking(), headers=known).status_code == 200
    assert client.post("/v1/completions", content=b"x" * 101, headers=known).status_code == 413
    assert len(cluster.asked) == 2


def test_a_path_prefix_is_taken_off(cluster_of):
    cluster = cluster_of()
    servers = front.Servers(cluster.ask, (LostError,), "backbone")
    client = TestClient(front.Front(servers, Access()), "http://localhost", client=HERE, root_path="/llm")
    assert client.post("/llm/v1/completions", json=asking()).status_code == 200
    assert client.get("/llm/v1/models/bob").json()["id"] == "bob"


def test_a_client_that_goes_away_takes_its_rows_with_it(cluster_of):
    cluster = cluster_of()
    for engine in cluster.engines:
        engine.pause = 60.0
    servers = front.Servers(cluster.ask, (LostError,), "backbone")
    app, body = front.Front(servers, Access()), json.dumps(asking(stream=True)).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "query_string": b"",
        "client": HERE,
    }
    messages = [{"type": "http.request", "body": body}]

    async def receive():
        if messages:
            return messages.pop()
        while not any(engine.rows for engine in cluster.engines):
            await anyio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError("nothing was to be sent")

    anyio.run(app, scope, receive, send)
    assert sum(len(engine.cancelled) for engine in cluster.engines) == 1
    assert not any(engine.rows for engine in cluster.engines)
