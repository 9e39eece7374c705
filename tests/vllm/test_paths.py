"""Which of the paths of vLLM's server a key opens."""

import dataclasses
from types import SimpleNamespace

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastprompt.integrations.vllm.paths import BARE, PROMPTED, UNCOUNTED, Paths
from fastprompt.serving.http import Access, Options
from fastprompt.serving.http.access import Caller, Names
from fastprompt.serving.http.rates import Limiter

USER = Caller("user", Names(("backbone", "a")))
STRANGER = Caller("stranger", Names(("a",)))
LIMITED = dataclasses.replace(USER, limiter=Limiter(None, 1000))
ADMIN = Caller("admin", admin=True)


def client_of(caller: Caller, access: Access | None = None, **options) -> TestClient:
    server = SimpleNamespace(
        access=access or Access(admin_keys=("an-admin-key-0123",)),
        options=Options(**options),
        engine=SimpleNamespace(name="backbone"),
    )
    inner = Paths(PlainTextResponse("vLLM's"), server)

    async def outer(scope, receive, send):
        scope.setdefault("state", {})["caller"] = caller
        await inner(scope, receive, send)

    return TestClient(outer)


@pytest.mark.parametrize(
    ("caller", "paths", "status"),
    [
        (STRANGER, PROMPTED | {"/v1/models/a", "/v1/prompts/a", "/health"}, 200),  # whose routes look themselves
        (USER, BARE, 200),
        (STRANGER, BARE, 404),
        (LIMITED, UNCOUNTED, 403),
        (LIMITED, BARE - UNCOUNTED, 200),
        (USER, {"/metrics", "/load", "/v1/completions/render", "/v1/chat/completions/batch", "/v1/nothing"}, 403),
        (USER, {"/inference/v1/generate", "/invocations", "/abort_requests", "/v1/load_lora_adapter", "/v2/chat"}, 403),
        (USER, {"/v1/completions/", "//v1/completions", "/V1/completions", "/static/../v1/load", "/metrics/x"}, 403),
        (ADMIN, {"/metrics", "/load", "/v1/nothing", "/v1/responses"}, 200),
    ],
)
def test_paths(caller, paths, status):
    client = client_of(caller)
    assert {path: client.request("POST", path).status_code for path in paths} == dict.fromkeys(paths, status)


def test_metrics_are_open_where_the_server_was_told():
    assert client_of(USER, open_metrics=True).get("/metrics").status_code == 200


@pytest.mark.parametrize("access", [None, Access()], ids=["keys", "no keys"])
def test_websockets_are_closed(access):
    with pytest.raises(WebSocketDisconnect), client_of(ADMIN, access).websocket_connect("/v1/realtime") as socket:
        socket.receive_text()
