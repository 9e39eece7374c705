"""OpenAI's own Python client against a server on a port."""

from __future__ import annotations

import asyncio

import openai
import pytest
from serving.http.fakes import expected
from serving.http.test_access import ADA, ADMIN, TOML

from fastprompt.serving.http import Access

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def port(port_of):
    with port_of() as port:
        yield port


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"{port.url}/v1", api_key="anything", max_retries=0, timeout=600) as client:
        yield client


def test_completions(client, tokenizer):
    made = client.completions.create(model="ada", prompt=["one", "two"], max_tokens=5, n=2, logprobs=2, seed=3)
    assert [c.index for c in made.choices] == [0, 1, 2, 3] and made.usage.completion_tokens == 20
    want = expected("ada", tokenizer("two").input_ids, 5, 1, seed=3)
    assert made.choices[3].text == tokenizer.decode(want, skip_special_tokens=True)
    assert len(made.choices[0].logprobs.tokens) == 5 and made._request_id
    streamed = client.completions.create(
        model="ada", prompt="two", max_tokens=5, stream=True, stream_options={"include_usage": True}, seed=3
    )
    chunks = list(streamed)
    want = expected("ada", tokenizer("two").input_ids, 5, seed=3)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == tokenizer.decode(want, skip_special_tokens=True)
    assert chunks[-1].usage.completion_tokens == 5


def test_extensions_go_in_extra_body(client, engine):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [7]}
    client.completions.create(model="ada", prompt="x", extra_body=extra)
    assert engine.seen[-1].params.top_k == 5 and engine.seen[-1].params.stop_token_ids == (7,)


def test_chats(client, tokenizer):
    made = client.chat.completions.create(
        model="ada", messages=MESSAGES, max_completion_tokens=6, logprobs=True, top_logprobs=2
    )
    content = made.choices[0].message.content
    assert len(made.choices[0].logprobs.content) == 6 and made.choices[0].finish_reason == "length"
    with client.chat.completions.create(model="ada", messages=MESSAGES, max_tokens=6, stream=True) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    ids = tokenizer("user: hello\nassistant:", add_special_tokens=False).input_ids
    stop = {"stop_token_ids": [expected("ada", ids, 6)[4]]}  # the helper takes no answer that was cut
    with client.chat.completions.stream(model="ada", messages=MESSAGES, max_tokens=6, extra_body=stop) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content and content.startswith(final.message.content) and final.finish_reason == "stop"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["backbone", "ada", "bob", "eve"]
    assert client.models.retrieve("bob").id == "bob"


def test_errors_are_the_clients_own(client, engine):
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="nobody", prompt="x")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="ada", prompt="x", max_tokens=10_000)
    assert raised.value.code == "context_length_exceeded"
    engine.active = {str(i): None for i in range(64)}
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="ada", prompt="x")
    engine.active = {}
    engine.error, engine.fail_after = ZeroDivisionError(), 2
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="ada", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="ada", prompt="x")


def test_keys(port_of, tmp_path):
    (tmp_path / "keys.toml").write_text(TOML)
    with port_of(Access(tmp_path / "keys.toml")) as port:
        url = f"{port.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong-wrong-wrong-wrong", max_retries=0).models.list()
        assert [m.id for m in openai.OpenAI(base_url=url, api_key=ADA).models.list()] == ["ada"]
        assert len(openai.OpenAI(base_url=url, api_key=ADMIN).models.list().data) == 4


def test_many_at_once(port, tokenizer):
    """64 requests under way, streamed and not: each gets the answer of its own prompt."""

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{port.url}/v1", api_key="x", max_retries=0, timeout=600) as client:

            async def ask(i: int) -> None:
                model = ["ada", "bob", "eve", "backbone"][i % 4]
                ids, stream = [5 + i, 6], i % 3 == 0
                made = await client.completions.create(model=model, prompt=ids, max_tokens=7, stream=stream)
                text = "".join([c.choices[0].text async for c in made]) if stream else made.choices[0].text
                want = expected(None if model == "backbone" else model, ids, 7)
                assert text == tokenizer.decode(want, skip_special_tokens=True)

            await asyncio.gather(*(ask(i) for i in range(64)))

    asyncio.run(main())
