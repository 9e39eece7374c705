"""Health, readiness, metrics, and what is said while the engine loads or is dead."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving.http.test_completions import error

from fastprompt.serving.http import create_app


def samples(text):
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if not s.name.endswith("_created")
    }


def test_while_the_engine_loads(engine):
    """Nothing of the engine but its name and tokenizer is there before it has started."""
    started = asyncio.Event()

    class Loading(type(engine)):
        registry = property(lambda self: self._registry if started.is_set() else pytest.fail("not there yet"))
        alive = True
        ready = True

        def __init__(self) -> None:
            self.tokenizer, self.name, self._registry = engine.tokenizer, "backbone", engine.registry
            self.limits, self.active, self.seen, self.cancelled = engine.limits, {}, [], []
            self.residency = engine.residency

        async def start(self) -> None:
            await started.wait()

        async def close(self, drain=None) -> None:
            pass

    async def main() -> None:
        loading = Loading()
        type(loading).alive = False
        app = create_app(loading)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as c:
            assert (await c.get("/health")).status_code == 200
            for path in ("/ready", "/v1/models", "/v1/prompts", "/v1/stats"):
                response = await c.get(path)
                assert error(response, 503)["code"] == "unavailable" and response.headers["retry-after"] == "5"
            asked = {"model": "ada", "prompt": "x"}
            error(await c.post("/v1/completions", json=asked), 503)
            assert samples((await c.get("/metrics")).text)[("fastprompt_ready",)] == 0
            type(loading).alive = True
            started.set()
            while (await c.get("/ready")).status_code != 200:
                await asyncio.sleep(0)
            assert (await c.post("/v1/completions", json=asked)).status_code == 200

    asyncio.run(main())


def test_an_engine_that_cannot_start(engine):
    async def fail() -> None:
        raise RuntimeError("no such weights")

    async def main() -> None:
        engine.start = fail
        app = create_app(engine)
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as c:
            while app.state.server.failure is None:
                await asyncio.sleep(0)
            error(await c.get("/health"), 503)
            error(await c.get("/ready"), 503)

    asyncio.run(main())


def test_a_dead_engine(client, engine):
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json() == {"status": "ready"}
    engine.alive = False
    for path in ("/health", "/ready", "/v1/models", "/v1/stats"):
        error(client.get(path), 503)
    assert client.get("/metrics").status_code == 200


def test_draining(client):
    client.app.state.server.draining = True
    assert client.get("/health").status_code == 200
    response = client.post("/v1/completions", json={"model": "ada", "prompt": "x"})
    assert error(response, 503)["code"] == "unavailable" and "retry-after" in response.headers
    for method, path in (("GET", "/ready"), ("PUT", "/v1/prompts/x"), ("DELETE", "/v1/prompts/ada")):
        error(client.request(method, path), 503)
    assert client.get("/v1/models").status_code == 200 and client.get("/v1/stats").json()["ready"] is False


def test_metrics(client, engine):
    for model in ("ada", "bob", "nobody"):
        client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 3})
    client.get("/v1/models/ada")
    client.get("/no/such/path")
    client.request("BREW", "/v1/models")
    text = client.get("/metrics").text
    found = samples(text)
    route = ("route", "/v1/completions")
    assert found[("fastprompt_http_requests_total", ("method", "POST"), route, ("status", "200"))] == 2
    assert found[("fastprompt_http_requests_total", ("method", "POST"), route, ("status", "404"))] == 1
    assert found[("fastprompt_requests_total", ("reason", "length"))] == 2
    assert found[("fastprompt_time_to_first_token_seconds_count",)] == 2
    assert found[("fastprompt_generated_tokens_total",)] == 11 and found[("fastprompt_batch_prompts",)] == 2
    assert found[("fastprompt_ready",)] == 1 and found[("fastprompt_prompts",)] == 3
    for tier, hits in (("device", 4), ("host", 5)):
        assert found[("fastprompt_bank_hits_total", ("tier", tier))] == hits
        assert found[("fastprompt_bank_evictions_total", ("tier", tier))] == 2
    assert found[("fastprompt_bank_disk_loads_total",)] == 6
    assert "ada" not in text and "nobody" not in text and "/no/such" not in text and "BREW" not in text


def test_two_apps_have_metrics_of_their_own(client_of):
    first, second = client_of(), client_of()
    first.get("/v1/models")
    key = ("fastprompt_http_requests_total", ("method", "GET"), ("route", "/v1/models"), ("status", "200"))
    assert samples(first.get("/metrics").text)[key] == 1 and key not in samples(second.get("/metrics").text)


def test_every_answer_has_its_own_id(client):
    ids = {client.get(path).headers["x-request-id"] for path in ("/health", "/v1/models", "/nope", "/v1/models")}
    assert len(ids) == 4


def test_other_methods_and_paths(client):
    assert error(client.post("/health"), 405)["code"] == "method_not_allowed"
    assert error(client.get("/v1/completions"), 405)["type"] == "invalid_request_error"
    assert error(client.get("/v2/models"), 404)["code"] == "not_found"


def test_a_route_that_breaks_is_answered_and_counted(client, engine, monkeypatch):
    monkeypatch.setattr(engine.registry, "names", lambda *args: 1 / 0)
    response = client.get("/v1/models")
    assert error(response, 500)["code"] == "internal_error" and len(response.headers["x-request-id"]) == 32
    found = samples(client.get("/metrics").text)
    labels = ("method", "GET"), ("route", "/v1/models"), ("status", "500")
    assert found[("fastprompt_http_requests_total", *labels)] == 1 and client.app.state.server.active == 0
