"""The whole server on a port: HTTP, engine, tiers and a real backbone."""

import asyncio
import random
import statistics

import httpx
import pytest
from serving.http.conftest import Port

import fastprompt as fp
from bench.load_client import Traffic, ask, completion, load
from fastprompt import demo
from fastprompt.model import PromptedModel
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.http import create_app
from fastprompt.serving.scheduler import Rules

NEW = 8
WORDS = ["Anna", "Tom", "lives", "in", "the", "capital", "of", "works", "as", "a", "cat", "where", "city", "people"]
CONFIGS = (
    fp.PrefixTuning(num_virtual_tokens=16, init_std=0.5),
    fp.PromptTuning(num_virtual_tokens=8),
    fp.PTuningV2(num_virtual_tokens=32, init_std=0.5),
    fp.PTuning(num_virtual_tokens=5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifty prompts of four methods."""
    path = tmp_path_factory.mktemp("prompts")
    model = PromptedModel(demo.backbone())
    for i in range(50):
        model.add_prompt(f"p{i}", CONFIGS[i % len(CONFIGS)], seed=i)
        model.save_prompt(f"p{i}", path / f"p{i}")
        model.remove_prompt(f"p{i}")
    return path


def _server(folder, **options):
    made = EngineOptions(**({"max_model_len": 128, "device_bytes": 2**24} | options))
    engine = AsyncEngine(lambda: build_engine(demo.backbone(), folder, made), demo.tokenizer(), "embedded")
    return Port(create_app(engine))


def _requests(count, seed=0):
    """Models and texts at random."""
    rng = random.Random(seed)
    models = ["embedded", *(f"p{i}" for i in range(50))]
    return [(rng.choice(models), " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))) for _ in range(count)]


def _expected(folder, requests):
    """Answers of `PromptedModel.generate`, all requests in batches of a few hundred rows."""
    tokenizer, model = demo.tokenizer(), PromptedModel(demo.backbone())
    for name in sorted({model_name for model_name, _ in requests} - {"embedded"}):
        model.load_prompt(name, folder / name)
    texts = tokenizer([text for _, text in requests], return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        input_ids=texts.input_ids,
        attention_mask=texts.attention_mask,
        prompts=[None if name == "embedded" else name for name, _ in requests],
        max_new_tokens=NEW,
        do_sample=False,
    )
    return tokenizer.batch_decode(out[:, texts.input_ids.shape[1] :], skip_special_tokens=True)


async def _ask_all(url, requests, concurrency):
    """Every other request streams."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def one(i, model, text):
            body = {"model": model, "prompt": text, "max_tokens": NEW, "temperature": 0}
            async with gate:
                if i % 2:
                    response = await client.post(f"{url}/v1/completions", json=body)
                    assert response.status_code == 200, response.text
                    return response.json()["choices"][0]["text"]
                port = int(url.rpartition(":")[2])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                streamed = completion(model, text, NEW) | {"min_tokens": 0}
                answer = await ask(reader, writer, streamed)
                writer.close()
                assert not answer.error
                return answer.text

        return await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))


def test_500_concurrent_answers_are_those_of_generate(folder):
    requests = _requests(500)
    expected = _expected(folder, requests)
    with _server(folder) as port:
        found = asyncio.run(_ask_all(port.url, requests, 64))
        assert found == expected
        assert len(set(expected)) > 100  # prompts and texts make a difference
        stats = port.app.state.server.engine.stats()
        assert stats.blocks_free == stats.blocks and stats.steps < 500 * NEW


def test_poison_changes_nothing_for_others(folder):
    requests = _requests(40, seed=1)
    poison = [
        {"prompt": ""},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"prompt": "one " * 5000},
        {"prompt": "one", "temperature": "NaN"},
        {"prompt": "one", "stop": ["x" * 2**20]},
        {"prompt": "one", "max_tokens": 10**9},
        {"prompt": "one", "model": "nobody"},
    ]
    with _server(folder) as port:

        async def both():
            async with httpx.AsyncClient(timeout=600) as client:

                async def bad(body):
                    given = {"model": "p1", "max_tokens": NEW} | body
                    response = await client.post(f"{port.url}/v1/completions", json=given)
                    assert 400 <= response.status_code < 500, response.text
                    assert response.json()["error"]["message"]

                good = asyncio.create_task(_ask_all(port.url, requests, 16))
                await asyncio.gather(*(bad(body) for body in poison * 5))
                return await good

        assert asyncio.run(both()) == _expected(folder, requests)


def test_a_flood_does_not_starve_others(folder):
    """One tenant keeps 60 long requests under way; another's short ones wait for a small share of that."""
    with _server(folder, rules=Rules(max_rows=8)) as port:

        async def times():
            flood = asyncio.create_task(load(port.number, Traffic(["p0"], ["one two"], 64), 60, 2.0))
            while port.app.state.server.engine.stats().waiting < 40 and not flood.done():
                await asyncio.sleep(0.01)
            late = await load(port.number, Traffic(["p1"], ["Anna lives in"], 4), 1, 1.0)
            return late, await flood

        late, flood = asyncio.run(times())
        assert not any(a.error for a in (*late, *flood))
        waited = statistics.median(a.total for a in late)
        assert waited < statistics.median(a.total for a in flood) / 4, waited


def test_a_minute_of_load(folder):
    """Zipf over fifty tenants, a bank that holds a third of them: no error, and memory that does not grow."""
    with _server(folder, device_bytes=20 * 32 * 2048) as port:
        models = [f"p{i}" for i in range(50)]
        server = port.app.state.server
        warm = asyncio.run(load(port.number, Traffic(models, WORDS, NEW, seed=1), 16, 15.0))
        before = _resident()
        answers = asyncio.run(load(port.number, Traffic(models, WORDS, NEW, seed=2), 16, 45.0))
        grown = _resident() - before
        assert not [a.error for a in (*warm, *answers) if a.error]
        assert len({a.model for a in answers}) > 25
        assert grown < 0.03 * before, f"{grown} bytes more than {before}"
        assert server.engine.residency.stats().device.evictions > 0


def _resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
