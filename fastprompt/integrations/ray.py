"""A Ray Serve application: replicas of the server over one folder of prompts, each prompt's requests on one of them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

try:
    from pydantic import BaseModel, ConfigDict, Field, field_validator
    from ray import serve
    from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
    from ray.serve import Application
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise ImportError(f"Ray Serve needs {error.name}: pip install 'fastprompt[ray]'") from error

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from fastprompt.serving.launch import EngineConfig

REPLICA_HEADER = "x-fastprompt-replica"
_REQUEST_ID = b"x-request-id"
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_BESIDE = 64  # requests beyond those an engine queues: they are told to come again, not sent to another replica
_FRONT_REQUESTS = 16_384
_REFRESH_SECONDS = 1.0  # between looks for prompts that other replicas stored


class Settings(BaseModel):
    """What to serve and how; `backbone` and `prompts` are needed.

    Fields up to `host_bytes` are the options of `fastprompt serve` (`bank_bytes` is its `--bank-bytes`; sizes are
    numbers or text such as "2GiB"), so are `keys`, `insecure` and `open_metrics`. `num_replicas` run engines,
    `num_fronts` read requests and send them on. `options` go to `serve.deployment` for the engines: resources of a
    replica (`ray_actor_options`), `autoscaling_config` in place of `num_replicas`, and so on.
    """

    model_config = ConfigDict(extra="forbid")

    backbone: str
    prompts: str
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_rows: int | None = Field(None, ge=1)
    max_batch_tokens: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    max_queued: int = Field(1024, ge=1)
    kv_bytes: int | None = None
    bank_bytes: int | None = None
    host_bytes: int | None = None
    keys: str | None = None
    insecure: bool = False
    open_metrics: bool = False
    num_replicas: int = Field(2, ge=1)
    num_fronts: int = Field(2, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kv_bytes", "bank_bytes", "host_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any, info: Any) -> Any:
        from fastprompt.cli.sizes import parse_bytes

        return parse_bytes(info.field_name, value) if isinstance(value, str) else value

    def engine(self) -> EngineConfig:
        """The engine of every replica."""
        from fastprompt.serving.launch import EngineConfig

        same = ("backbone", "prompts", "device", "dtype", "max_rows", "max_batch_tokens", "max_model_len")
        given = {name: getattr(self, name) for name in (*same, "name", "max_queued", "kv_bytes", "host_bytes")}
        return EngineConfig(device_bytes=self.bank_bytes, **given)

    def absolute(self) -> Settings:
        """The same with absolute paths: replicas run elsewhere."""
        keys = None if self.keys is None else os.path.abspath(self.keys)
        backbone = os.path.abspath(self.backbone) if os.path.isdir(self.backbone) else self.backbone
        return self.model_copy(update={"backbone": backbone, "prompts": os.path.abspath(self.prompts), "keys": keys})


class Replica:
    """An engine and its HTTP application, which is called with requests that a front has read."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        from fastprompt.serving.http import Options, create_app
        from fastprompt.serving.launch import make_engine

        engine = make_engine(settings.engine())
        await engine.start()
        self._engine = engine
        options = Options(open_metrics=settings.open_metrics, refresh_seconds=_REFRESH_SECONDS)
        self._app = create_app(engine, _access(settings), options)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[dict[str, Any]], None]:
        """ASGI messages in answer to a request, as they come."""
        from fastprompt.serving.relay.inside import messages_of

        async with aclosing(messages_of(self._app, scope, body)) as sent:
            async for messages in sent:
                for message in messages:
                    if message["type"] == "http.response.start":
                        kept = [header for header in message["headers"] if header[0] != _REQUEST_ID]  # Ray has its own
                        message["headers"] = [*kept, (REPLICA_HEADER.encode(), self._name.encode())]
                yield [dict(message) for message in messages]

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        from fastprompt.serving.http.server import EngineEndedError

        if not self._engine.alive:
            raise EngineEndedError("the engine has ended: see the log of this replica")

    async def __del__(self) -> None:  # Ray Serve awaits it once nothing is under way
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)


class Front:
    """What clients reach over HTTP: sends a request to the replica that its prompt's name stands for."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        from fastprompt.serving.http import Options
        from fastprompt.serving.relay import front

        self._replicas = replicas
        lost = (RayActorError, WorkerCrashedError, ObjectLostError)
        servers = front.Servers(self._ask, lost, settings.engine().served_name)
        self._front = front.Front(servers, _access(settings), Options(), settings.insecure)
        self._response = front.FrontResponse

    async def __call__(self, request: Request) -> Response:
        return self._response(self._front)

    async def _ask(self, scope: Any, body: bytes, key: str) -> AsyncGenerator[list[dict[str, Any]], None]:
        answer = self._replicas.options(method_name="answer", stream=True, session_id=key).remote(scope, body)
        try:
            async for messages in answer:
                yield messages
        finally:
            answer.cancel()  # what runs for a client that went away; nothing where it has ended


def app(settings: Settings | Mapping[str, Any]) -> Application:
    """The application of these settings, for `serve run` and Serve's config files.

    Semantics:
        serve run fastprompt.integrations.ray:app backbone=embedded prompts=demo-prompts num_replicas=2
    Errors: pydantic's ValidationError; what is wrong with a backbone or a key shows when replicas start.
    """
    settings = Settings.model_validate(settings).absolute()
    engines: dict[str, Any] = {
        "num_replicas": settings.num_replicas,
        "max_ongoing_requests": settings.max_queued + _BESIDE,
        "request_router_config": RequestRouterConfig(request_router_class=_ROUTER),
        **settings.options,
    }
    if "autoscaling_config" in settings.options:
        del engines["num_replicas"]
    replicas = serve.deployment(Replica, name="Replica").options(**engines).bind(settings)
    fronts = serve.deployment(Front, name="Front").options(
        num_replicas=settings.num_fronts,
        max_ongoing_requests=_FRONT_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return fronts.bind(settings, replicas)


def build_app(backbone: str, prompts: str | os.PathLike[str], **settings: Any) -> Application:
    """The application over a backbone and a folder of prompts; other `Settings` by name.

    Semantics:
        serve.run(build_app("embedded", "demo-prompts", num_replicas=2))
    """
    return app(Settings(backbone=backbone, prompts=os.fspath(prompts), **settings))


def _access(settings: Settings) -> Any:
    from pathlib import Path

    from fastprompt import env
    from fastprompt.serving.http.watched_access import WatchedAccess

    return WatchedAccess(Path(settings.keys) if settings.keys else None, env.api_keys(), env.admin_keys())
