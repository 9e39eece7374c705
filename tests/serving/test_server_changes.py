"""The whole server with a real engine while prompts come, change and go over HTTP, and while bodies are wrong."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving.http.conftest import Port
from serving.http.processes import PATIENCE
from serving.http.streams import events, joined
from serving.http.test_malformed import fuzzed

import fastprompt as fp
from fastprompt import demo
from fastprompt.model import PromptedModel
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.engine import EngineStats
from fastprompt.serving.http import create_app

TEXT = " ".join(["Anna lives in the capital of the people where Tom works as a cat in the city of"] * 3)  # many blocks
TENANTS = ("ada", "bob", "eve")
VERSIONS, NEW, CLIENTS, CHANGES = 6, 8, 12, 25
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def versions() -> list[tuple[Files, str]]:
    """Prompts of one method and length: their files, and the answer to the one text under each."""
    model, tokenizer = PromptedModel(demo.backbone()), demo.tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    found = []
    for seed in range(VERSIONS):
        model.add_prompt("it", fp.PrefixTuning(num_virtual_tokens=16, init_std=3.0), seed=seed)
        out = model.generate(input_ids=ids, prompts="it", max_new_tokens=NEW, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found.append((prompt_files(model.remove_prompt("it")), answer))
    assert len({answer for _, answer in found}) >= VERSIONS - 1
    return found


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    options = EngineOptions(max_model_len=128, device_bytes=2**24, block_size=4)
    engine = AsyncEngine(lambda: build_engine(demo.backbone(), tmp_path, options), demo.tokenizer(), "embedded")
    with Port(create_app(engine)) as port:
        yield port


def _idle(port: Port) -> EngineStats:
    """The engine's counts once no row holds anything: what a stop string ended may run on for a step."""
    engine, end = port.app.state.server.engine, time.monotonic() + PATIENCE
    while (stats := engine.stats()).blocks_free < stats.blocks or engine.residency.stats().leased:
        assert time.monotonic() < end, stats
        time.sleep(0.01)
    return stats


class Changes:
    """Tenants whose prompts are replaced, deleted and made again, and the answers that each may give now."""

    def __init__(self, client: httpx.AsyncClient, versions: list[tuple[Files, str]]) -> None:
        self.client, self.versions = client, versions
        self.current: dict[str, set[str | None]] = {name: {None} for name in TENANTS}  # None: there is no prompt
        self.waiting: list[tuple[str, set[str | None]]] = []

    async def make(self, name: str, number: int | None) -> None:
        """Give a name a version, or take its prompt away; while that is under way, old and new are both right."""
        after = None if number is None else self.versions[number][1]
        self._allow(name, self.current[name] | {after})
        if number is None:
            response = await self.client.delete(f"/v1/prompts/{name}")
        else:
            form = [("files", file) for file in self.versions[number][0].items()]
            response = await self.client.put(f"/v1/prompts/{name}", files=form)
        assert response.status_code in (200, 201, 204), response.text
        self.current[name] = {after}

    async def ask(self, name: str, stream: bool) -> None:
        """The answer is that of a version which the name stood for between question and answer."""
        allowed = set(self.current[name])
        self.waiting.append((name, allowed))
        body = {"model": name, "prompt": TEXT, "max_tokens": NEW, "temperature": 0, "stream": stream}
        response = await self.client.post("/v1/completions", json=body)
        self.waiting = [entry for entry in self.waiting if entry[1] is not allowed]
        assert _answer(response, stream) in allowed

    def _allow(self, name: str, answers: set[str | None]) -> None:
        self.current[name] = answers
        for waits, allowed in self.waiting:
            if waits == name:
                allowed |= answers


def _answer(response: httpx.Response, stream: bool) -> str | None:
    """The text; None where the prompt was not there, or not any more when the row's turn came."""
    if response.status_code == 404:
        return None
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["choices"][0]["text"]
    found = events(response.text)
    if "error" in found[-1]:
        assert found[-1]["error"]["code"] == "model_not_found"
        return None
    return joined(found)[0]


def test_no_answer_is_stale_or_anothers_while_prompts_change(port, versions):
    """Equal texts under names that are replaced, deleted and made again all the time."""
    chance = random.Random(0)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=port.url, timeout=600) as client:
            changes, done = Changes(client, versions), asyncio.Event()
            for number, name in enumerate(TENANTS):
                await changes.make(name, number)

            async def ask() -> int:
                asked = 0
                while not done.is_set():
                    await changes.ask(chance.choice(TENANTS), stream=chance.random() < 0.5)
                    asked += 1
                return asked

            clients = [asyncio.create_task(ask()) for _ in range(CLIENTS)]
            for _ in range(CHANGES):
                name = chance.choice(TENANTS)
                there = changes.current[name] != {None}
                await changes.make(name, None if there and chance.random() < 0.3 else chance.randrange(VERSIONS))
                await asyncio.sleep(chance.uniform(0.0, 0.1))
            done.set()
            assert sum(await asyncio.gather(*clients)) > CHANGES

    asyncio.run(main())
    assert _idle(port).hit_tokens > 0  # blocks were shared all the while: without their keys' salt this test fails


def test_bodies_of_every_kind_reach_the_engine_and_change_nothing(port, versions):
    """As against the fake engine, in fewer numbers: what the backbone is given can fail nowhere either."""
    rng = random.Random(1)

    async def main() -> dict[int, int]:
        seen: dict[int, int] = {}
        async with httpx.AsyncClient(base_url=port.url, timeout=600) as client:
            changes = Changes(client, versions)
            await changes.make("ada", 0)

            async def wrong() -> None:
                path, content, headers = fuzzed(rng)
                response = await client.post(path, content=content, headers=headers)
                assert response.status_code in (200, 400, 404), (content[:300], response.text)
                seen[response.status_code] = seen.get(response.status_code, 0) + 1

            for _ in range(50):
                await asyncio.gather(changes.ask("ada", True), changes.ask("ada", False), *(wrong() for _ in range(8)))
        return seen

    seen = asyncio.run(main())
    assert seen[200] > 20 and seen[400] > 100
    _idle(port)
