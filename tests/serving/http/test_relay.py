"""Several servers behind one face: where requests go, and servers that die while they answer."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.http.fakes import SPEC, FakeEngine
from starlette.testclient import TestClient

from fastprompt.serving.http import Access, Options, create_app
from fastprompt.serving.http.stream import DONE, event_of
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.relay import front
from fastprompt.serving.relay.inside import messages_of
from fastprompt.serving.relay.resume import Continuation, DivergedError
from fastprompt.serving.relay.routes import route

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
        return TestClient(front.Front(servers, self.access, options, insecure), client=where)


@pytest.fixture
def cluster_of(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(front, "PAUSES", (0.0, 0.0, 0.0))

    def make(*faults: int, access: Access | None = None) -> Cluster:
        engines = [
            FakeEngine(tokenizer, PromptRegistry(folder, SPEC), ready=True, alive=True, pause=0.001) for _ in range(2)
        ]
        return Cluster(engines, access or Access(), list(faults))

    return make


def events(text: str) -> list:
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


def joined(found: list) -> dict[int, str]:
    """The texts of a stream's choices; everything else of it is checked."""
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1, found
    assert len({(event["id"], event["created"]) for event in found[:-1]}) == 1
    texts: dict[int, str] = {}
    ended, opened = set(), set()
    for event in found[:-1]:
        for part in event["choices"]:
            assert part["index"] not in ended
            holder = part.get("delta", part)
            if "role" in holder:
                assert part["index"] not in opened
                opened.add(part["index"])
            texts[part["index"]] = texts.get(part["index"], "") + holder.get("text", holder.get("content", ""))
            if part["finish_reason"] is not None:
                ended.add(part["index"])
    assert ended == set(texts)
    return texts


def asking(**fields):
    return {"model": "ada", "prompt": "one two", "max_tokens": 6, "temperature": 0} | fields


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


@given(st.data())
def test_whatever_the_chunks_the_text_comes_once(data):
    """Two choices, cut at random in each answer, broken off anywhere."""
    texts = data.draw(st.lists(st.text("abä", max_size=12), min_size=1, max_size=2))
    chat = data.draw(st.booleans())

    def answer(name):
        made = []
        for index, text in enumerate(texts):
            cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            if chat:
                made.append((index, {"role": "assistant", "content": ""}, None))
            for i, piece in enumerate(pieces):
                made.append((index, {"content": piece}, "stop" if i == len(pieces) - 1 else None))
        found = [
            event_of(
                {
                    "id": name,
                    "created": 1,
                    "choices": [
                        {"index": i, "finish_reason": end} | ({"delta": part} if chat else {"text": part["content"]})
                    ],
                }
            )
            for i, part, end in made
        ]
        return [*found, event_of({"id": name, "created": 1, "choices": [], "usage": {}}), DONE]

    state, out = Continuation(), b""
    for attempt in range(data.draw(st.integers(0, 3))):
        whole = answer(f"try{attempt}")
        for event in whole[: data.draw(st.integers(0, len(whole)))]:
            out += state.take(event)
        state.again()
    out += state.take(b"".join(answer("last")))
    assert joined(events(out.decode())) == dict(enumerate(texts))


def test_another_text_is_not_glued_to_what_was_passed_on():
    def chunk(text, end=None):
        part = {"index": 0, "text": text, "finish_reason": end}
        return event_of({"id": "x", "created": 1, "choices": [part]})

    for second in (chunk("abX"), chunk("ab", "stop"), chunk("b")):
        state = Continuation()
        assert state.take(chunk("abc")) == chunk("abc")
        state.again()
        with pytest.raises(DivergedError):
            state.take(second)


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


def test_streams_that_cannot_go_on_say_so(cluster_of):
    answer = cluster_of(3).client().post("/v1/completions", json=asking(stream=True, logprobs=1))
    assert events(answer.text)[-1]["error"]["code"] == "unavailable" and "[DONE]" not in answer.text
    cluster = cluster_of(3)
    cluster.engines[1].registry.delete("ada")  # wherever it goes now, there is no such prompt
    found = events(cluster.client().post("/v1/completions", json=asking(stream=True)).text)
    assert found[-1]["error"]["code"] == "model_not_found" or "[DONE]" in found


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
    client = TestClient(front.Front(servers, Access()), client=HERE, root_path="/llm")
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
        "headers": [(b"content-type", b"application/json")],
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
