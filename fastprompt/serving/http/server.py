"""Running the application: where it may listen, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from fastprompt.errors import ArgumentError, FastPromptError
from fastprompt.serving.http.access import Access
from fastprompt.serving.http.state import Server

log = logging.getLogger("fastprompt.serving")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
FLUSH_SECONDS = 5  # for what is written already, once the engine has ended
WATCH_SECONDS = 0.25


class EngineEndedError(FastPromptError, RuntimeError):
    """The engine has ended by itself."""


@dataclass(frozen=True)
class Binding:
    """Where to listen; `hosts` are the names to be addressed by, None for any."""

    host: str
    port: int
    hosts: frozenset[str] | None


def binding(host: str, port: int, access: Access, insecure: bool = False) -> Binding:
    """Where a server may listen: without keys on this machine only, unless `insecure` is true.

    Errors: ArgumentError for another address without keys.
    """
    if not access.open:
        return Binding(host, port, None)
    if is_loopback(host):
        log.warning("there are no keys: everybody on this machine may use and administer the server, nobody else")
        return Binding(host, port, LOOPBACK | {host})
    if not insecure:
        raise ArgumentError(
            f"--host is {host!r} and there are no keys: anybody who reaches it could use and administer the server. "
            "Give --keys or FASTPROMPT_API_KEYS and FASTPROMPT_ADMIN_KEYS, or stay on 127.0.0.1, or say --insecure"
        )
    log.warning("there are no keys: anybody who reaches %s may use and administer the server", host)
    return Binding(host, port, None)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_free(place: Binding) -> None:
    """Raise ArgumentError where nobody can listen, before a backbone is loaded for it."""
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        old = [address for address in found if address[0] == socket.AF_INET]  # a machine may have no other
        for family, kind, protocol, _, address in old or found:
            with socket.socket(family, kind, protocol) as held:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                held.bind(address)
    except OSError as error:
        raise ArgumentError(
            f"--host {place.host} --port {place.port} cannot be listened at ({error.strerror}): choose another port, "
            "or an address of this machine"
        ) from None


def run(app: FastAPI, place: Binding, drain_seconds: float = 30.0) -> None:
    """Serve until a signal says to end.

    Semantics:
        SIGTERM, SIGINT    /ready says 503, new requests get 503, those in progress have `drain_seconds` to end
        a second one       ends the process at once
        SIGHUP             the keys file is read again
    Errors: what kept the engine from starting; EngineEndedError if it has died since.
    """
    runner = _Runner(app, place, drain_seconds)
    loop = (runner.config.get_loop_factory() or asyncio.new_event_loop)()  # uvloop's, where it is installed
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(runner.run())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


class _Runner:
    def __init__(self, app: FastAPI, place: Binding, drain_seconds: float) -> None:
        self.config = uvicorn.Config(
            app,
            host=place.host,
            port=place.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        self.state: Server = app.state.server
        self.uvicorn = _Uvicorn(self.config)
        self.drain_seconds = drain_seconds
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.tasks.append(asyncio.create_task(self.watch()))
        try:
            await self.uvicorn.serve()
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.state.failure is not None:
            raise self.state.failure

    def end(self) -> None:
        """The first signal: drain. The next one finds the system's own handler."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        log.info("draining: %d requests in progress, at most %g s", self.state.active, self.drain_seconds)
        self.state.draining = True
        self.tasks.append(asyncio.create_task(self.drain()))

    async def drain(self) -> None:
        deadline = time.monotonic() + self.drain_seconds
        while self.state.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.state.active:
            log.warning("%d requests did not end in time and are cancelled", self.state.active)
        try:
            if self.state.started:
                await self.state.engine.close()
        except Exception:
            log.exception("the engine did not end as it should")
        finally:
            self.uvicorn.should_exit = True

    def reload(self) -> None:
        try:
            self.state.access.reload()
        except FastPromptError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("the keys were read again")

    async def watch(self) -> None:
        """End the process when the engine has ended by itself, so that whoever runs it may start it again."""
        frozen = False
        while not self.uvicorn.started or self.state.alive or self.state.draining:
            if self.state.ready and not frozen:
                frozen = True
                gc.freeze()  # what is there now stays: collections need not look through it again
            await asyncio.sleep(WATCH_SECONDS)
        self.state.failure = self.state.failure or EngineEndedError("the engine has ended: see the log above")
        self.uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
