"""Servers for a load generator, each in a process of its own: ours, and PEFT behind the same HTTP face."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.measure import CheckFailed
from bench.tenants import NAME
from fastprompt import demo

_MAX_ROWS = 64
Serve = Callable[[Connection, Path, int], None]


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    port: int
    pid: int

    def memory(self) -> int:
        """Resident bytes."""
        return memory.status("VmRSS", pid=self.pid)["VmRSS"]


@contextlib.contextmanager
def server(serve: Serve, folder: Path, threads: int) -> Iterator[Running]:
    """Run a server on a free port until the block ends."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, folder, threads), daemon=True)
    process.start()
    try:
        if not here.poll(600):
            raise CheckFailed("a server did not start within ten minutes")
        assert process.pid is not None
        yield Running(here.recv(), process.pid)
    finally:
        process.terminate()
        process.join(60)
        process.kill()


def ours(pipe: Connection, folder: Path, threads: int) -> None:
    """fastprompt over the prompts in `folder/prompts`."""
    from fastprompt.serving.async_engine import AsyncEngine
    from fastprompt.serving.build import EngineOptions, build_engine
    from fastprompt.serving.scheduler import Rules

    def build() -> Any:
        torch.set_num_threads(threads)
        return build_engine(demo.backbone(), folder / "prompts", EngineOptions(rules=Rules(max_rows=_MAX_ROWS)))

    _serve(AsyncEngine(build, demo.tokenizer(), NAME), pipe)


def peft(pipe: Connection, folder: Path, threads: int) -> None:
    """PEFT over the same prompts as adapters in `folder/peft`."""
    from bench.peft_engine import PeftEngine
    from fastprompt.integrations.transformers.probe import inspect_backbone
    from fastprompt.serving.registry import PromptRegistry

    torch.set_num_threads(threads)
    registry = PromptRegistry(folder / "prompts", inspect_backbone(demo.backbone()).spec)
    adapters = {name: folder / "peft" / name for name in registry.names()}
    _serve(PeftEngine(demo.backbone(), adapters, demo.tokenizer(), NAME, registry, _MAX_ROWS), pipe)


def _serve(engine: Any, pipe: Connection) -> None:
    """Serve on a free port, and say which once the engine is there."""
    import uvicorn

    from fastprompt.serving.http import create_app

    config = uvicorn.Config(create_app(engine), port=0, log_level="warning", access_log=False)
    running = uvicorn.Server(config)

    async def main() -> None:
        task = asyncio.create_task(running.serve())
        while not (running.started and engine.alive and engine.ready):
            if task.done():
                task.result()
                return
            await asyncio.sleep(0.05)
        pipe.send(running.servers[0].sockets[0].getsockname()[1])
        await task

    asyncio.run(main())
