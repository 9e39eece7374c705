"""Signals to a server process: draining, ending at once, reading keys again."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest
from serving.http.test_access import ADA, TOML

from fastprompt.errors import ArgumentError
from fastprompt.serving.http import Access, create_app
from fastprompt.serving.http.server import EngineEndedError, _Runner, binding, run


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


def test_an_engine_that_does_not_close_does_not_keep_the_process(engine, caplog):
    async def broken(drain: float | None = None) -> None:
        raise RuntimeError("it hangs on")

    async def main() -> bool:
        await engine.start()
        engine.close = broken
        runner = _Runner(create_app(engine), binding("127.0.0.1", 0, Access()), 0.0)
        await runner.drain()
        return runner.uvicorn.should_exit

    assert asyncio.run(main()) and "it hangs on" in caplog.text
