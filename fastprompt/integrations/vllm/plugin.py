"""vLLM's endpoint plugin: prompts by name in its HTTP server, keys, and the administration of prompts."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Route

from fastprompt import env
from fastprompt.errors import ArgumentError, FastPromptError
from fastprompt.integrations.vllm.administration import ExportedPrompts, Face
from fastprompt.integrations.vllm.client import PromptedClient
from fastprompt.integrations.vllm.handlers import PromptedHandler
from fastprompt.integrations.vllm.launch import PLUGIN
from fastprompt.integrations.vllm.offline import special_ids
from fastprompt.integrations.vllm.paths import Paths
from fastprompt.integrations.vllm.store import PrefixStore
from fastprompt.integrations.vllm.tickets import Seal, code_ids
from fastprompt.integrations.vllm.versions import check_installed
from fastprompt.serving.http import admin, errors, models
from fastprompt.serving.http.access import Access
from fastprompt.serving.http.gate import Gate
from fastprompt.serving.http.metrics import Metrics
from fastprompt.serving.http.options import Options
from fastprompt.serving.http.server import binding
from fastprompt.serving.http.state import Server
from fastprompt.serving.http.watched_access import WatchedAccess

HANDLERS = {"openai_serving_completion": "create_completion", "openai_serving_chat": "create_chat_completion"}
PATHS = ("/v1/models", "/v1/models/{name:path}", "/v1/prompts", "/v1/prompts/{name}")
MAX_BODY_BYTES = 64 << 20  # a chat may hold images


class PromptEndpoints:
    """The entry point of group `vllm.endpoint_plugins`; VLLM_PLUGINS must name it: `fastprompt`.

    Semantics:
        /v1/completions, /v1/chat/completions     `model` names a prompt, or the backbone
        /v1/models                                 the backbone and the prompts that a key may use
        /v1/prompts, /v1/prompts/{name}            GET, PUT, DELETE for administrators
        every path                                 keys, limits and sizes as in the embedded server
    Settings are in `kv_connector_extra_config`, see `transfer_config`: "store", and where wanted "prompts" (a folder to
    write to), "keys" (a file), "insecure", "open_metrics". Errors when the server starts: FastPromptError.
    """

    name = PLUGIN
    required_tasks = None  # whatever the model does: keys hold for all of it

    def __init__(self) -> None:
        self.server: Server | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Put the gate before all of vLLM's routes, and the routes of `PATHS` among them."""
        check_installed()
        settings = _settings(getattr(app.state.args, "kv_transfer_config", None))
        access = WatchedAccess(_path(settings.get("keys")), env.api_keys(), env.admin_keys())
        args = app.state.args
        place = binding(args.host or "0.0.0.0", args.port or 0, access, bool(settings.get("insecure")))
        options = Options(
            max_body_bytes=MAX_BODY_BYTES, hosts=place.hosts, open_metrics=bool(settings.get("open_metrics"))
        )
        prompts = ExportedPrompts(PrefixStore(settings["store"]), _path(settings.get("prompts")))
        self.server = _server(Face(prompts), access, options)
        inner = _application(self.server)
        taken = {"/v1/models"}
        app.router.routes[:] = [r for r in app.router.routes if not (isinstance(r, APIRoute) and r.path in taken)]
        for path in PATHS:
            app.router.routes.append(Route(path, inner, methods=["GET", "PUT", "DELETE"]))
        app.add_middleware(Paths, server=self.server)
        app.add_middleware(Gate, server=self.server)
        app.add_exception_handler(FastPromptError, errors.on_api_error)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Let vLLM's handlers answer under prompts."""
        if engine_client is None or self.server is None:
            return
        face: Any = self.server.engine
        seal, model = Seal(env.vllm_secret() or ""), engine_client.vllm_config.model_config
        client = PromptedClient(
            engine_client, seal, code_ids(model.get_vocab_size(), special_ids(model.hf_text_config))
        )
        for name, create in HANDLERS.items():
            handler = getattr(state, name, None)
            if handler is not None:
                setattr(state, name, PromptedHandler(handler, create, face.registry.store, client))
        face.serve(state.openai_serving_models.base_model_paths[0].name)


def _settings(config: Any) -> dict[str, Any]:
    """What `transfer_config` said."""
    found = dict(getattr(config, "kv_connector_extra_config", None) or {})
    if getattr(config, "kv_connector", None) != "FastPromptConnector" or "store" not in found:
        raise ArgumentError(
            "kv_transfer_config names no store of prompts: start the server by fastprompt serve --engine vllm, or with "
            "what fastprompt.integrations.vllm.transfer_config returns"
        )
    return found


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)


def _server(face: Any, access: Access, options: Options) -> Server:
    disk = ThreadPoolExecutor(options.max_uploads + 1, "fastprompt-disk")  # one looks while others compile
    uploads = asyncio.Semaphore(options.max_uploads)
    pieces: Any = None  # what only the embedded engine's answers need
    return Server(face, access, options, Metrics(), pieces, uploads, disk)


def _application(server: Server) -> FastAPI:
    """The routes of `PATHS`, with a state of their own: vLLM's application has another `server`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    prompts = APIRouter(tags=["administration"], dependencies=list(admin.router.dependencies))
    prompts.get("/v1/prompts")(admin.list_prompts)
    prompts.get("/v1/prompts/{name}")(admin.get_prompt)
    prompts.put("/v1/prompts/{name}")(admin.put_prompt)
    prompts.delete("/v1/prompts/{name}", status_code=204)(admin.delete_prompt)
    for router in (models.router, prompts):
        app.include_router(router)
    app.add_exception_handler(FastPromptError, errors.on_api_error)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_api_error)
    return app
