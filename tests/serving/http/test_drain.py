"""Signals to a server process: draining, ending at once, reading keys again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving.http.test_access import ADA, ANY, TOML, bearer

from fastprompt.errors import ArgumentError
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.http.server import EngineEndedError, binding, run

TESTS = Path(__file__).parents[2]
PATIENCE = 600.0
ASKED = {"model": "ada", "prompt": [5, 6], "max_tokens": 60}


class Process:
    def __init__(self, folder: Path, keys: Path, pause: float, drain: float) -> None:
        command = [
            sys.executable,
            str(Path(__file__).with_name("drain_app.py")),
            *map(str, (folder, keys, pause, drain)),
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self.reader.start()

    def get(self, path: str, key: str = ANY) -> int:
        return httpx.get(self.url + path, headers=bearer(key), timeout=PATIENCE).status_code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ask(self, **fields: object) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
        """A request under way in a thread, and where its answer will be."""
        answers: list[httpx.Response | Exception] = []

        def ask() -> None:
            try:
                url = f"{self.url}/v1/completions"
                answers.append(httpx.post(url, json=ASKED | fields, headers=bearer(ANY), timeout=PATIENCE))
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        return thread, answers

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end and self.process.poll() is None, self.log
            time.sleep(0.01)

    def running(self) -> bool:
        page = httpx.get(f"{self.url}/v1/stats", headers=bearer("key-of-admin-0123456789"), timeout=PATIENCE)
        return page.json()["engine"]["running"] > 0

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join()
        return code


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    (tmp_path / "keys.toml").write_text(TOML)
    started: list[Process] = []

    def make(pause: float, drain: float) -> Process:
        started.append(Process(folder, tmp_path / "keys.toml", pause, drain))
        started[-1].until(lambda: started[-1].get("/ready") == 200)
        return started[-1]

    yield make
    for process in started:
        process.process.kill()
        process.end()


def test_what_runs_may_end_and_what_is_new_is_refused(start, tmp_path):
    process = start(pause=0.05, drain=600)
    (tmp_path / "keys.toml").write_text(TOML.replace('prompts = ["ada"]', 'prompts = ["eve"]'))
    process.signal(signal.SIGHUP)  # keys are read again
    process.until(lambda: process.get("/v1/models/eve", ADA) == 200)
    assert process.get("/v1/models/ada", ADA) == 404
    (tmp_path / "keys.toml").write_text("no keys at all")
    process.signal(signal.SIGHUP)
    process.until(lambda: any("stay as they were" in line for line in process.log))
    assert process.get("/v1/models/eve", ADA) == 200
    thread, answers = process.ask()
    process.until(process.running)
    process.signal(signal.SIGTERM)
    process.until(lambda: process.get("/ready") == 503)
    refused, refusals = process.ask()
    refused.join()
    assert refusals[0].status_code == 503 and refusals[0].json()["error"]["code"] == "unavailable"
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 60
    assert process.end() == 0
    assert not any("Traceback" in line for line in process.log), process.log


def test_what_does_not_end_in_time_is_told_so(start):
    process = start(pause=1.0, drain=0.5)
    thread, answers = process.ask()
    process.until(process.running)
    process.signal(signal.SIGTERM)
    assert process.end() == 0
    thread.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "aborted"
    assert any("did not end in time" in line for line in process.log)


def test_a_second_signal_ends_it_at_once(start):
    process = start(pause=1.0, drain=3600)
    thread, answers = process.ask()
    process.until(process.running)
    process.signal(signal.SIGTERM)
    process.until(lambda: process.get("/ready") == 503)
    process.signal(signal.SIGTERM)
    assert process.end() == -signal.SIGTERM
    thread.join()
    assert isinstance(answers[0], httpx.HTTPError)


def test_a_server_whose_engine_cannot_start_ends_with_its_error(engine):
    async def fail() -> None:
        raise ArgumentError("kv_bytes is too small")

    engine.start = fail
    with pytest.raises(ArgumentError, match="kv_bytes is too small"):
        run(create_app(engine), binding("127.0.0.1", 0, Access()))


def test_a_server_whose_engine_died_ends(engine):
    async def die() -> None:
        engine.alive = engine.ready = True
        asyncio.get_running_loop().call_later(0.5, setattr, engine, "alive", False)

    engine.start = die
    with pytest.raises(EngineEndedError, match="engine has ended"):
        run(create_app(engine), binding("127.0.0.1", 0, Access()))
