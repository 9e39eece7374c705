"""kill -9 while prompts are stored, replaced and asked for: a restart finds the last good version of everything."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import httpx
from serving.http.fakes import SPEC
from serving.http.processes import PATIENCE, Process
from serving.http.test_access import ANY, bearer

from fastprompt.serving.registry import PromptRegistry

ADMIN = bearer("key-of-admin-0123456789")
KILLS = 3


def _work(process: Process, files: list[dict[str, bytes]], stop: threading.Event, stored: list[int]) -> None:
    """Replace one prompt and store others, and ask under them, until the server is gone."""
    with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=process.url, timeout=PATIENCE) as client:
        for i in range(10_000):
            if stop.is_set():
                return
            name, own = ("ada", f"new-{i}")[i % 2], files[i % 3 % 2]
            form = [("files", (file, content)) for file, content in own.items()]
            assert client.put(f"/v1/prompts/{name}", files=form, headers=ADMIN).status_code in (200, 201)
            stored.append(i)
            body = {"model": name, "prompt": [5, 6], "max_tokens": 2}
            assert client.post("/v1/completions", json=body, headers=bearer(ANY)).status_code == 200


def test_a_killed_server_leaves_whole_prompts(start, folder, files, other_files):
    chance, both = random.Random(0), [files, other_files]
    for _ in range(KILLS):
        process = start(pause=0.0, drain=1.0)
        stop, stored = threading.Event(), list[int]()
        thread = threading.Thread(target=_work, args=(process, both, stop, stored))
        thread.start()
        process.until(lambda stored=stored: len(stored) > 4)
        time.sleep(chance.uniform(0.0, 0.1))
        process.process.kill()
        thread.join(PATIENCE)
        stop.set()
        assert not thread.is_alive()
        found = PromptRegistry(folder, SPEC)  # as the next server opens it
        names = found.names()
        assert {"ada", "bob", "eve", "new-1", "new-3"} <= set(names)
        for name in names:
            assert found.load(found.current(name)).length in (3, 5)
        assert sorted(path.name for path in folder.iterdir()) == names  # nothing half written is left
