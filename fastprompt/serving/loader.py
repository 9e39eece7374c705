"""Threads that read prompts from disk while the engine's thread goes on."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fastprompt.errors import FastPromptError, PromptFileError
from fastprompt.serving.versions import PromptVersion

Read = TypeVar("Read")


@dataclass(frozen=True)
class Loaded(Generic[Read]):
    """What came of reading a version: `content`, or the error that it failed with; when it began, how long it took."""

    version: PromptVersion
    content: Read | None
    error: FastPromptError | None
    begin: float
    seconds: float


class Loader(Generic[Read]):
    """Calls `read(version)` for one version after the other in `threads` threads, without gradients.

    Semantics: each version that was started comes out of `take` once, as its content or as an error: whatever `read`
    raises concerns that version alone. `on_ready` is called in the thread whenever one is done.
    """

    def __init__(self, read: Callable[[PromptVersion], Read], threads: int, on_ready: Callable[[], None]) -> None:
        self._read, self._on_ready = read, on_ready
        self._asked: queue.SimpleQueue[PromptVersion | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded[Read]] = queue.SimpleQueue()
        self._started: set[str] = set()
        self._threads: list[threading.Thread] = []
        ready = threading.Barrier(threads + 1)
        for _ in range(threads):
            thread = threading.Thread(target=self._run, args=(ready,), name="fastprompt-loader", daemon=True)
            thread.start()
            self._threads.append(thread)
        ready.wait()
        torch.set_num_threads(torch.get_num_threads())  # what the loaders set is also what new threads begin with

    def __len__(self) -> int:
        """Versions started and not taken yet."""
        return len(self._started)

    def __contains__(self, version: str) -> bool:
        return version in self._started

    def start(self, version: PromptVersion) -> None:
        """Have a version read; does nothing for one under way."""
        if version.version not in self._started:
            self._started.add(version.version)
            self._asked.put(version)

    def take(self) -> list[Loaded[Read]]:
        """What has been read since the last call."""
        taken = []
        while not self._done.empty():
            loaded = self._done.get()
            self._started.discard(loaded.version.version)
            taken.append(loaded)
        return taken

    def close(self) -> None:
        """Finish what is being read and end the threads; what waits is not read any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._asked.get_nowait()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, ready: threading.Barrier) -> None:
        torch.set_num_threads(1)  # this thread's copies must not compete with the engine's threads
        ready.wait()
        while (version := self._asked.get()) is not None:
            begin = time.perf_counter()
            content, error = self._attempt(version)
            self._done.put(Loaded(version, content, error, begin, time.perf_counter() - begin))
            self._on_ready()

    @torch.no_grad()
    def _attempt(self, version: PromptVersion) -> tuple[Read | None, FastPromptError | None]:
        try:
            return self._read(version), None
        except FastPromptError as error:
            return None, error
        except Exception as error:  # MemoryError, a file system's mishap: the thread must outlive it
            return None, PromptFileError(f"prompt {version.name!r} could not be read: {error!r}")
