"""vLLM's HTTP server in processes of its own, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_cases import NAME, Served, environment

from fastprompt.integrations.vllm.launch import VllmServer

START_SECONDS = 900  # a machine may be busy with other things


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Reply(dict):
    """A JSON answer with its status and headers."""

    status: int
    headers: Any


class Client:
    """Requests to a server, with one key or none."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port, self.key = port, key

    def with_key(self, key: str) -> Client:
        return Client(self.port, key)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        with self.open(method, path, body, **headers) as response:
            content = response.read()
            reply = Reply(json.loads(content) if content else {})
            reply.status, reply.headers = response.status, response.headers
            return reply

    def post(self, path: str, **body: Any) -> Reply:
        return self.call("POST", path, body)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        with self.open("POST", path, body | {"stream": True}) as response:
            lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The response as it comes, an error too."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = "application/zip" if isinstance(body, bytes) else "application/json"
        sent = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            sent["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, sent, method=method)
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            return error


@contextmanager
def processes(commands: Sequence[tuple[list[str], dict[str, str], Path]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Commands with an environment and a log each, in process groups that end with the block."""
    running = []
    try:
        for command, variables, log in commands:
            with log.open("wb") as out:
                running.append(
                    subprocess.Popen(
                        command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(port: int, running: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """Until a server answers; with what it logged if it ends instead."""
    for _ in range(START_SECONDS * 2):
        if any(process.poll() is not None for process in running):
            raise AssertionError("\n".join(log.read_text()[-4000:] for log in logs))
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server was not ready in {START_SECONDS} s")


def server_of(served: Served, port: int, *more: str, **options: Any) -> VllmServer:
    """A server of the tests: fp32, small pages, a small cache."""
    small = ("--enforce-eager", "--block-size=32", *more)
    return VllmServer(
        str(served.backbone),
        NAME,
        served.store.folder,
        served.prompts,
        port=port,
        dtype="float32",
        max_model_len=512,
        kv_bytes=32 << 20,
        more=small,
        **options,
    )


def server_environment(**more: str) -> dict[str, str]:
    """The environment of a server: its engine in a process of its own."""
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return environment(**apart, **more)


@contextmanager
def running(served: Served, folder: Path, **variables: str) -> Iterator[Client]:
    """A server over a store, ready."""
    port = free_port()
    server, log = server_of(served, port), folder / "server.log"
    with processes([(server.command(), server.environment(server_environment(**variables)), log)]) as started:
        wait_for(port, started, [log])
        yield Client(port)
