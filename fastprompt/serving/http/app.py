"""The ASGI application: which routes there are, and what goes on while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import fastprompt
from fastprompt.errors import FastPromptError
from fastprompt.serving.http import admin, chat, completions, dashboard, errors, health, models
from fastprompt.serving.http.access import Access
from fastprompt.serving.http.engine_metrics import EngineCollector
from fastprompt.serving.http.face import Engine
from fastprompt.serving.http.gate import Gate
from fastprompt.serving.http.metrics import Metrics
from fastprompt.serving.http.options import Options
from fastprompt.serving.http.state import Server
from fastprompt.serving.http.vocabulary import Vocabulary
from fastprompt.serving.listing import REST

log = logging.getLogger("fastprompt.serving")


def create_app(
    engine: Engine,
    access: Access | None = None,
    options: Options | None = None,
) -> FastAPI:
    """A server's application over an engine.

    Semantics:
        app = create_app(engine, Access(Path("keys.toml")), Options())
        app.state.server         # engine, access, options, metrics; `draining` refuses what is new

    The engine starts with the application, unless it runs already, and ends with it. Engines that continue texts have
    completions and chats, encoders have classification and embeddings. Without `access` everybody may do everything.
    """
    options = options or Options()
    # parsing a prompt is torch's work: in a thread of its own, which must not have a pool of threads too
    disk = ThreadPoolExecutor(2, "fastprompt-disk", initializer=torch.set_num_threads, initargs=(1,))
    uploads = asyncio.Semaphore(options.max_uploads)
    server = Server(engine, access or Access(), options, Metrics(), Vocabulary(engine.tokenizer), uploads, disk)
    app = FastAPI(title="fastprompt", version=fastprompt.__version__, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.server = server
    server.metrics.registry.register(EngineCollector(server))
    engine.observe = server.metrics.finished
    app.add_middleware(Gate, server=server)
    app.add_exception_handler(FastPromptError, errors.on_api_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_api_error)
    for router in (health.router, models.router, admin.router, dashboard.router, *_routers(engine)):
        app.include_router(router)
    return app


def _routers(engine: Engine) -> Sequence[APIRouter]:
    """The routes of what this engine does."""
    if hasattr(type(engine), "generate"):
        return completions.router, chat.router
    from fastprompt.serving.http.classify import ENCODER_ROUTERS

    return ENCODER_ROUTERS


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the engine beside the server, which says meanwhile that it is not ready; end it with the server."""
    server: Server = app.state.server
    tasks = [asyncio.create_task(_refresh(server))]
    if not server.engine.alive:
        server.loading = True
        tasks.append(asyncio.create_task(_start(server)))
    try:
        yield
    finally:
        server.draining = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if server.engine.alive:
            await server.engine.close()
        server.disk.shutdown(wait=False, cancel_futures=True)


async def _start(server: Server) -> None:
    try:
        await server.engine.start()
    except Exception as error:
        log.error("the engine could not be started", exc_info=None if isinstance(error, FastPromptError) else error)
        server.failure = error
    finally:
        server.loading = False


async def _refresh(server: Server) -> None:
    """Look now and then for prompts that other processes stored or removed."""
    while True:
        await asyncio.sleep(server.options.refresh_seconds)
        if not server.started:
            continue
        try:
            await server.on_disk(lambda: server.engine.registry.refresh(REST))
        except FastPromptError as error:
            log.warning("%s", error)  # the folder is away for a moment
        except Exception:  # the next look may be luckier
            log.exception("the folder of prompts could not be looked at")
