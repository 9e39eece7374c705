"""The embedded server's routes over an exported store, as the plugin puts them into vLLM's server; without vLLM."""

import io
import zipfile

import pytest
from starlette.testclient import TestClient
from vllm_cases import NAME, Served

from fastprompt import PrefixTuning, prompt_format
from fastprompt.integrations.vllm.administration import ExportedPrompts, Face
from fastprompt.integrations.vllm.plugin import _application, _server
from fastprompt.serving.http import Access, Options
from fastprompt.serving.http.gate import Gate


@pytest.fixture
def client(small: Served) -> TestClient:
    small.add("kept", PrefixTuning(num_virtual_tokens=3), seed=1)
    small.export()
    server = _server(Face(ExportedPrompts(small.store, small.prompts)), Access(), Options())
    server.engine.serve(NAME)
    return TestClient(Gate(_application(server), server))


def archive(served: Served, name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for file, content in prompt_format.prompt_files(served.model.library[name]).items():
            out.writestr(file, content)
    return packed.getvalue()


def test_prompts_are_listed_stored_and_deleted(client, small):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME, "kept"]
    assert client.get("/v1/models/kept").json()["parent"] == NAME
    assert [prompt["name"] for prompt in client.get("/v1/prompts").json()["data"]] == ["kept"]
    small.add("new", PrefixTuning(num_virtual_tokens=4), seed=2, save=False)
    zipped = {"content-type": "application/zip"}
    put = client.put("/v1/prompts/new", content=archive(small, "new"), headers=zipped)
    assert put.status_code == 201, put.text
    read = client.get("/v1/prompts/new")
    assert (read.json()["length"], small.store.current("new").length) == (4, 4)
    wrong = client.put("/v1/prompts/new", content=archive(small, "kept"), headers=zipped | {"if-match": '"0"'})
    assert wrong.status_code == 412
    put = client.put(
        "/v1/prompts/new", content=archive(small, "kept"), headers=zipped | {"if-match": read.headers["etag"]}
    )
    assert put.status_code == 200 and small.store.current("new").length == 3
    assert client.delete("/v1/prompts/new").status_code == 204
    assert client.get("/v1/prompts/new").status_code == client.delete("/v1/prompts/new").status_code == 404
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME, "kept"]
