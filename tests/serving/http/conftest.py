"""A server over the fake engine, in this process or on a port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from serving.http.fakes import TEMPLATE, FakeEngine, prompt_files, write_prompt
from starlette.testclient import TestClient

from fastprompt import demo
from fastprompt.serving.http import Access, Options, create_app
from fastprompt.serving.registry import PromptRegistry


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    made = demo.tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return prompt_files(tmp_path_factory.mktemp("prompt") / "it")


@pytest.fixture(scope="session")
def other_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return prompt_files(tmp_path_factory.mktemp("other") / "it", seed=1, length=5)


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name in ("ada", "bob", "eve"):
        write_prompt(tmp_path / "prompts" / name, files)
    return tmp_path / "prompts"


@pytest.fixture
def engine(tokenizer: Any, folder: Path) -> FakeEngine:
    from serving.http.fakes import SPEC

    return FakeEngine(tokenizer, PromptRegistry(folder, SPEC))


MakeClient = Callable[..., TestClient]


@pytest.fixture
def client_of(engine: FakeEngine) -> Iterator[MakeClient]:
    """A client of an app with this access and these options; the app runs until the test ends."""
    opened: list[TestClient] = []

    def make(access: Access | None = None, options: Options | None = None, **settings: Any) -> TestClient:
        client = TestClient(create_app(engine, access, options), **settings)
        client.__enter__()
        opened.append(client)
        while client.get("/ready").status_code != 200:
            pass
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def client(client_of: MakeClient) -> TestClient:
    return client_of()


class Port:
    """A server in a thread, and its address."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on")
        self.app, self.server = app, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run)
        self.loop: asyncio.AbstractEventLoop

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(main())

    @property
    def number(self) -> int:
        return self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.number}"

    def __enter__(self) -> Port:
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.01)
            assert self._thread.is_alive()
        while httpx.get(f"{self.url}/ready").status_code != 200:
            self._thread.join(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.server.force_exit = True
        self._thread.join()


@pytest.fixture
def port_of(engine: FakeEngine) -> Callable[..., AbstractContextManager[Port]]:
    @contextmanager
    def make(access: Access | None = None, options: Options | None = None) -> Iterator[Port]:
        with Port(create_app(engine, access, options)) as port:
            yield port

    return make


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts servers over `folder`, and ends them with the test."""
    from serving.http.processes import Process
    from serving.http.test_access import TOML

    (tmp_path / "keys.toml").write_text(TOML)
    started: list[Any] = []

    def make(pause: float, drain: float) -> Any:
        started.append(Process(folder, tmp_path / "keys.toml", pause, drain))
        started[-1].until(lambda: started[-1].get("/ready") == 200)
        return started[-1]

    yield make
    for process in started:
        process.process.kill()
        process.end()
