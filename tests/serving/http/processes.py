"""A server over the fake engine in a process of its own, to be sent signals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from serving.http.test_access import ANY, bearer

TESTS = Path(__file__).parents[2]
PATIENCE = 600.0
ASKED = {"model": "ada", "prompt": [5, 6], "max_tokens": 60}


class Process:
    """`drain_app.py`: tokens come `pause` seconds apart, and SIGTERM leaves `drain` seconds."""

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
        once = httpx.Limits(max_keepalive_connections=0)  # nothing that stays open would be waited for
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE, limits=once)
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self.reader.start()

    def get(self, path: str, key: str = ANY) -> int:
        return self.client.get(path, headers=bearer(key)).status_code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ask(self, **fields: object) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
        """A request under way in a thread, and where its answer will be."""
        answers: list[httpx.Response | Exception] = []

        def ask() -> None:
            try:
                answers.append(self.client.post("/v1/completions", json=ASKED | fields, headers=bearer(ANY)))
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
        page = self.client.get("/v1/stats", headers=bearer("key-of-admin-0123456789"))
        return page.json()["engine"]["running"] > 0

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join()
        self.client.close()
        return code
