"""Rate limits, by a clock that stands still until it is told to go on."""

from __future__ import annotations

import pytest
from serving.http.fakes import expected
from serving.http.test_access import bearer
from serving.http.test_completions import error

from fastprompt.serving.http import Access
from fastprompt.serving.http.errors import ApiError
from fastprompt.serving.http.rates import Bucket, Limiter
from fastprompt.serving.request import OverloadedError

KEY, FREE = "a-limited-key-012345", "an-unlimited-key-012345"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limited(tmp_path, clock, client_of):
    def make(limits: str):
        (tmp_path / "keys.toml").write_text(
            f"[[keys]]\nname='l'\nkey='{KEY}'\nprompts=['*']\n{limits}\n[[keys]]\nname='f'\nkey='{FREE}'\nprompts=['*']"
        )
        return client_of(Access(tmp_path / "keys.toml", clock=clock))

    return make


def test_a_bucket(clock):
    bucket = Bucket(60, clock)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1) == pytest.approx(1.0) and bucket.take(30) == pytest.approx(30.0)
    clock.now += 0.5
    assert bucket.take(1) == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take(1) == 0.0 and bucket.take(1) > 0
    clock.now += 1e6
    assert bucket.take(60) == 0.0 and bucket.take(1) > 0  # never more than a minute's
    bucket.give_back(1e9)
    assert bucket.take(60) == 0.0 and bucket.take(1) > 0
    clock.now -= 50  # a clock that steps back gives nothing
    assert bucket.take(1) > 0


def test_what_is_not_used_comes_back(clock):
    limiter = Limiter(None, 100, clock)
    assert limiter.take_tokens(10, 40) == 50
    with pytest.raises(ApiError, match="100 tokens a minute"):
        limiter.take_tokens(10, 50)
    limiter.settle(50, 12)
    assert limiter.take_tokens(10, 78) == 88
    assert limiter.settle(88, 88) is None and limiter.tokens.take(1) > 0
    with pytest.raises(ApiError, match="shorten the text"):
        limiter.take_tokens(101, 1)


def test_requests_a_minute(limited, clock):
    client = limited("requests_per_minute = 3")
    for path in ("/v1/models", "/v1/models/ada", "/v1/models"):
        assert client.get(path, headers=bearer(KEY)).status_code == 200
    response = client.post("/v1/completions", json={"model": "ada", "prompt": "x"}, headers=bearer(KEY))
    told = error(response, 429)
    assert told["code"] == "rate_limit_exceeded" and response.headers["retry-after"] == "20"
    assert client.get("/v1/models", headers=bearer(FREE)).status_code == 200  # another key has its own
    clock.now += 20
    assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200
    assert client.get("/v1/models", headers=bearer(KEY)).status_code == 429


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute(limited, clock, engine, stream):
    client = limited("tokens_per_minute = 100")

    def ask(text: int, new: int, **fields):
        body = {"model": "ada", "prompt": [5] * text, "max_tokens": new, "stream": stream} | fields
        return client.post("/v1/completions", json=body, headers=bearer(KEY))

    assert ask(20, 30).status_code == 200  # 50 left
    response = ask(20, 40)
    assert error(response, 429)["code"] == "rate_limit_exceeded" and response.headers["retry-after"] == "6"
    error(ask(101, 1), 400)  # can never pass: no use in coming again
    assert ask(20, 10, n=3).status_code == 200  # none left
    assert ask(1, 1).status_code == 429
    clock.now += 60
    stop = engine.tokenizer.decode(expected("ada", [5] * 4, 1))
    assert ask(4, 90, stop=stop).status_code == 200  # stops at once, so that nearly all comes back
    assert ask(20, 70).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "status"), [(ZeroDivisionError(), 500), (OverloadedError("full", 1.0), 429)], ids=["broken", "full"]
)
def test_a_request_that_fails_costs_nothing_but_a_request(limited, engine, stream, wrong, status):
    client = limited("tokens_per_minute = 100")
    asked = {"model": "ada", "prompt": [5] * 40, "max_tokens": 50, "stream": stream}
    engine.error, engine.fail_after = wrong, 0
    for _ in range(5):
        response = client.post("/v1/completions", json=asked, headers=bearer(KEY))
        assert response.status_code == status and error(response, status)["code"] != "rate_limit_exceeded"
    engine.fail_after = 3  # what was written, and the text that it was written to, is to be paid
    assert client.post("/v1/completions", json=asked, headers=bearer(KEY)).status_code == (200 if stream else status)
    engine.error = None
    assert error(client.post("/v1/completions", json=asked, headers=bearer(KEY)), 429)["code"] == "rate_limit_exceeded"
    assert client.post("/v1/completions", json=asked | {"max_tokens": 17}, headers=bearer(KEY)).status_code == 200
