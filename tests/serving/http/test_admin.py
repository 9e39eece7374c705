"""`/v1/prompts`: uploads, versions, conditions and limits."""

from __future__ import annotations

import errno
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from serving.http.test_completions import error

from fastprompt.serving.http import Options

OCTETS = {"content-type": "application/octet-stream"}


def zipped(files, folder=""):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(folder + name, content)
    return made.getvalue()


def tarred(files, mode="w:gz"):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def form(files):
    return [("files", (name, content)) for name, content in files.items()]


UPLOADS = {
    "form": lambda f: {"files": form(f)},
    "form of a browser's folder": lambda f: {"files": form({f"folder/{n}": c for n, c in f.items()})},
    "form of an archive": lambda f: {"files": [("archive", ("it.ZIP", zipped(f)))]},
    "zip": lambda f: {"content": zipped(f), "headers": {"content-type": "application/zip"}},
    "tar": lambda f: {"content": tarred(f, "w"), "headers": OCTETS},
    "tar.gz": lambda f: {"content": tarred(f)},
}


@pytest.mark.parametrize("way", UPLOADS)
def test_storing_replacing_and_removing(client, engine, files, other_files, way):
    made = client.put("/v1/prompts/new", **UPLOADS[way](files))
    assert made.status_code == 201, made.text
    described = made.json()
    assert (described["name"], described["method"], described["length"]) == ("new", "prompt_tuning", 3)
    assert made.headers["etag"] == f'"{described["version"]}"' and "folder" not in described
    assert client.post("/v1/completions", json={"model": "new", "prompt": "x"}).status_code == 200
    replaced = client.put("/v1/prompts/new", **UPLOADS[way](other_files))
    assert replaced.status_code == 200 and replaced.json()["length"] == 5
    assert client.get("/v1/prompts/new").json() == replaced.json()
    assert engine.residency.dropped == ["new", "new"]
    assert client.delete("/v1/prompts/new").status_code == 204
    assert error(client.get("/v1/prompts/new"), 404)["code"] == "prompt_not_found"
    assert error(client.delete("/v1/prompts/new"), 404)["code"] == "prompt_not_found"
    assert client.post("/v1/completions", json={"model": "new", "prompt": "x"}).status_code == 404


def test_conditions(client, files, other_files):
    first = client.get("/v1/prompts/ada").headers["etag"]
    put = {"files": form(other_files)}
    for headers in (
        {"if-match": '"other"'}, {"if-match": f"W/{first}"}, {"if-match": '"a", "b"'}, {"if-none-match": "*"},
    ):  # fmt: skip
        told = error(client.put("/v1/prompts/ada", **put, headers=headers), 412)
        assert told["code"] == "precondition_failed"
    for name in ("absent",):
        for value in ("*", first, f'"a", {first}'):
            error(client.put(f"/v1/prompts/{name}", **put, headers={"if-match": value}), 412)
    assert client.get("/v1/prompts/ada").headers["etag"] == first
    second = client.put("/v1/prompts/ada", **put, headers={"if-match": f'"x", {first}'})
    assert second.status_code == 200 and second.headers["etag"] != first
    assert client.put("/v1/prompts/ada", **put, headers={"if-match": "*"}).status_code == 200
    assert client.put("/v1/prompts/fresh", **put, headers={"if-none-match": "*"}).status_code == 201
    error(client.delete("/v1/prompts/ada", headers={"if-match": first}), 412)
    assert client.delete("/v1/prompts/ada", headers={"if-match": second.headers["etag"]}).status_code == 204


@pytest.mark.parametrize("value", ["", "x", '"open', '"a" "b"', "*,*", "W/x", ",", '"a",,"b"', "\xff"])
def test_conditions_that_are_malformed(client, files, value):
    headers = {"if-match": value.encode("latin-1")}
    assert client.put("/v1/prompts/ada", files=form(files), headers=headers).status_code in (400, 412)
    headers = {"if-none-match": value.encode("latin-1")}
    error(client.put("/v1/prompts/ada", files=form(files), headers=headers), 400)


def test_reading_what_is_known_already(client):
    tag = client.get("/v1/prompts/ada").headers["etag"]
    for value in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        response = client.get("/v1/prompts/ada", headers={"if-none-match": value})
        assert response.status_code == 304 and response.content == b"" and response.headers["etag"] == tag
    assert client.get("/v1/prompts/ada", headers={"if-none-match": '"x"'}).status_code == 200


def test_of_many_writers_one_wins(port_of, files, other_files):
    import httpx

    with port_of() as port:
        tag = httpx.get(f"{port.url}/v1/prompts/ada").headers["etag"]
        answers: list[int] = []

        def write(i: int) -> None:
            headers = {"if-match": tag} if i % 2 else {"if-none-match": "*"}
            url = f"{port.url}/v1/prompts/{'ada' if i % 2 else 'fresh'}"
            answers.append(httpx.put(url, files=form(other_files), headers=headers, timeout=300).status_code)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == [200, 201] + [412] * 14


BROKEN = {
    "nothing": {"content": b""},
    "no archive": {"content": b"not an archive at all"},
    "zip that ends early": {"content": zipped({"prompt.json": b"{}" * 1000})[:300]},
    "other files": {"files": form({"a.txt": b"x"})},
    "a pickle": {"files": form({"adapter_config.json": b"{}", "adapter_model.bin": b"x"})},
    "two of a name": {"files": [("a", ("prompt.json", b"{}")), ("b", ("x/prompt.json", b"{}"))]},
    "fields": {"data": {"a": "b"}, "files": form({"prompt.json": b"{}"})},
    "a form without files": {"content": b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    "no boundary": {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    "a form cut short": {"content": b"--b\r\nContent", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    "no such charset": {
        "content": b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n',
        "headers": {"content-type": "multipart/form-data; boundary=b; charset=base64"},
    },
    "many files": {"files": form({f"{i}": b"x" for i in range(40)})},
    "zip slip": {"content": zipped({"../../escaped/prompt.json": b"{}", "prompt.safetensors": b"x"})},
    "tar slip": {"content": tarred({"/tmp/escaped": b"{}", "../prompt.json": b"x"})},
    "metadata that is no JSON": {"files": form({"prompt.json": b"\xff", "prompt.safetensors": b"x"})},
    "weights that are none": {"files": form({"prompt.json": b"{}", "prompt.safetensors": b"x"})},
}


@pytest.mark.parametrize("what", BROKEN)
def test_uploads_that_are_no_prompt(client, engine, folder, what):
    before = sorted(p.name for p in folder.iterdir())
    tag = client.get("/v1/prompts/ada").headers["etag"]
    for name in ("ada", "new"):
        error(client.put(f"/v1/prompts/{name}", **BROKEN[what]), 400)
    assert sorted(p.name for p in folder.iterdir()) == before and not Path("/tmp/escaped").exists()
    assert client.get("/v1/prompts/ada").headers["etag"] == tag and engine.residency.dropped == []


def test_bombs(client, files):
    huge = files | {"prompt.safetensors": b"\0" * (100 << 20)}
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in huge.items():
            archive.writestr(name, content)
    assert len(compressed.getvalue()) < 1 << 20
    error(client.put("/v1/prompts/ada", content=compressed.getvalue()), 400)


@pytest.mark.parametrize("name", [".hidden", "..", "a" * 300, "%00", "a%0Ab", "a%2Fb", "%F0%9F%92%A9" * 60, "a\\b"])
def test_names_that_name_no_folder(client, files, name):
    assert client.put(f"/v1/prompts/{name}", files=form(files)).status_code in (400, 404, 405)


def test_the_backbones_name_is_taken(client, files):
    assert error(client.put("/v1/prompts/backbone", files=form(files)), 409)["code"] == "name_taken"


@pytest.mark.parametrize("way", ["announced", "chunked", "form"])
def test_uploads_that_are_too_large_are_not_read_to_their_end(client_of, engine, way):
    client = client_of(options=Options(max_upload_bytes=10_000))
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    if way == "chunked":
        response = client.put("/v1/prompts/new", content=chunks())
    elif way == "announced":
        response = client.put("/v1/prompts/new", content=b"", headers={"content-length": "10001"})
    else:
        response = client.put("/v1/prompts/new", files=form({"prompt.json": b"x" * 20_000}))
    assert error(response, 413)["code"] == "request_too_large" and "new" not in engine.registry
    error(client.put("/v1/prompts/new", content=b"", headers={"content-length": "9" * 30}), 413)


def test_a_full_disk(client, engine, files, monkeypatch):
    import fastprompt.folders

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tag = client.get("/v1/prompts/ada").headers["etag"]
    monkeypatch.setattr(fastprompt.folders, "_write", full)
    assert error(client.put("/v1/prompts/ada", files=form(files)), 507)["code"] == "disk_full"
    monkeypatch.undo()
    assert client.get("/v1/prompts/ada").headers["etag"] == tag
    assert client.put("/v1/prompts/ada", files=form(files)).status_code == 200


def test_a_damaged_prompt_is_listed_and_can_be_replaced(client, folder, files):
    (folder / "bob" / "prompt.json").write_bytes(b"{")
    shown = {p["name"]: p for p in client.get("/v1/prompts").json()["data"]}
    assert set(shown["bob"]) == {"name", "error"} and shown["ada"]["length"] == 3
    assert error(client.get("/v1/prompts/bob"), 409)["code"] == "prompt_unreadable"
    assert error(client.post("/v1/completions", json={"model": "bob", "prompt": "x"}), 503)["param"] == "model"
    assert client.get("/v1/models/bob").json()["created"] > 1_600_000_000  # of the file, which is not read for it
    (folder / "bob" / "prompt.json").unlink()
    assert client.get("/v1/models/bob").json()["created"] == 0
    assert client.put("/v1/prompts/bob", files=form(files)).status_code == 200
    (folder / "eve" / "prompt.json").write_bytes(b"{")
    assert client.delete("/v1/prompts/eve").status_code == 204


def test_pages(client_of):
    client = client_of(options=Options(page=2))
    first = client.get("/v1/prompts").json()
    assert [p["name"] for p in first["data"]] == ["ada", "bob"] and first["has_more"]
    rest = client.get(f"/v1/prompts?after={first['last_id']}").json()
    assert [p["name"] for p in rest["data"]] == ["eve"] and not rest["has_more"]


def test_pins_and_unloading(client, engine):
    assert client.post("/v1/prompts/ada/pin").json() == {"name": "ada", "pinned": True}
    shown = {p["name"]: (p["tier"], p["pinned"]) for p in client.get("/v1/prompts").json()["data"]}
    assert shown == {"ada": ("host", True), "bob": ("host", False), "eve": ("host", False)}
    error(client.post("/v1/prompts/absent/pin"), 404)
    client.post("/v1/prompts/bob/pin")
    assert error(client.post("/v1/prompts/eve/pin"), 409)["code"] == "bank_full"
    assert "unpin it first" in error(client.post("/v1/prompts/ada/unload"), 400)["message"]
    for _ in range(2):
        assert client.post("/v1/prompts/ada/unpin").json() == {"name": "ada", "pinned": False}
    assert client.post("/v1/prompts/ada/unload").json() == {"name": "ada", "unloaded": True}
    error(client.post("/v1/prompts/absent/unload"), 404)
    assert engine.residency.pins == {"bob"} and engine.residency.unloaded == ["ada"]


def test_stats(client, engine):
    client.post("/v1/completions", json={"model": "ada", "prompt": "x"})
    engine.active = {"1": "ada", "2": None}
    stats = client.get("/v1/stats").json()
    assert stats["engine"]["running_by_prompt"] == {"ada": 1, "backbone": 1} and stats["prompts"] == 3
    assert stats["recent"]["requests"] == 1 and stats["recent"]["time_to_first_token"]["p99"] == 0.02
    engine.active = {}


def test_other_processes_prompts_are_found(client_of, folder, files):
    from serving.http.fakes import write_prompt

    client = client_of(options=Options(refresh_seconds=0.01))
    write_prompt(folder / "later", files)
    while client.post("/v1/completions", json={"model": "later", "prompt": "x"}).status_code == 404:
        pass
    assert "later" in [m["id"] for m in client.get("/v1/models").json()["data"]]
