"""Keys: who may do what, and what the others are told."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from serving.http.test_completions import error

from fastprompt import env
from fastprompt.errors import ArgumentError, ConfigError
from fastprompt.serving.http import Access, Options
from fastprompt.serving.http.server import binding, is_loopback

ADA, BOB, ANY, ADMIN = (f"key-of-{name}-0123456789" for name in ("ada", "bob", "any", "admin"))
TOML = f"""
[[keys]]
name = "ada"
key = "{ADA}"
prompts = ["ada"]

[[keys]]
name = "bob"
sha256 = "{hashlib.sha256(BOB.encode()).hexdigest()}"
prompts = ["b*", "backbone", "absent"]
requests_per_minute = 600

[[keys]]
name = "any"
key = "{ANY}"
prompts = ["*"]

[[admin_keys]]
name = "ops"
key = "{ADMIN}"
"""


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.toml").write_text(TOML)
    return tmp_path / "keys.toml"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


USES = {ADA: {"ada"}, BOB: {"bob", "backbone"}, ANY: {"ada", "bob", "eve", "backbone"}}
USES[ADMIN] = USES[ANY]


@pytest.mark.parametrize("key", USES, ids=["ada", "bob", "any", "admin"])
def test_each_key_has_its_own_models(client_of, keys, key):
    client = client_of(Access(keys))
    listed = client.get("/v1/models", headers=bearer(key)).json()["data"]
    assert {model["id"] for model in listed} == USES[key]
    for name in ("ada", "bob", "eve", "backbone"):
        allowed = name in USES[key]
        asked = {"model": name, "prompt": "x"}
        chat = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        for response in (
            client.post("/v1/completions", json=asked, headers=bearer(key)),
            client.post("/v1/completions", json=asked | {"stream": True}, headers=bearer(key)),
            client.post("/v1/chat/completions", json=chat, headers=bearer(key)),
            client.get(f"/v1/models/{name}", headers=bearer(key)),
        ):
            assert response.status_code == (200 if allowed else 404), response.text


def test_a_forbidden_prompt_looks_like_one_that_does_not_exist(client_of, keys, engine, monkeypatch):
    client = client_of(Access(keys))
    looked_up: list[object] = []
    contains = type(engine.registry).__contains__
    monkeypatch.setattr(
        type(engine.registry), "__contains__", lambda self, name: looked_up.append(name) or contains(self, name)
    )
    said = []
    for name in ("eve", "eva"):  # only the first one exists
        for method, url, body in (
            ("POST", "/v1/completions", {"model": name, "prompt": "x"}),
            ("POST", "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
            ("GET", f"/v1/models/{name}", None),
        ):
            response = client.request(method, url, json=body, headers=bearer(BOB))
            headers = {k: v for k, v in response.headers.items() if k != "x-request-id"}
            said.append((response.status_code, response.text.replace(name, "NAME"), headers))
    assert said[:3] == said[3:] and said[0][0] == 404
    assert looked_up == ["eve"] * 3 + ["eva"] * 3  # the same work for both: nothing to measure


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong-wrong-wrong-wrong",
        ADA,
        f"Basic {ADA}",
        f"Bearer {ADA}x",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/prompts", "/v1/stats", "/metrics", "/v1/nothing", "/nothing"])
def test_without_a_valid_key_there_is_nothing(client_of, keys, authorization, path):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    response = client_of(Access(keys)).get(path, headers=headers)
    told = error(response, 401)
    assert told["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"


def test_what_anybody_may_see(client_of, keys):
    client = client_of(Access(keys))
    for path in ("/health", "/ready", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert client_of(Access(keys), Options(open_metrics=True)).get("/metrics").status_code == 200


ADMINISTRATION = [
    ("GET", "/v1/prompts"), ("GET", "/v1/prompts/ada"), ("PUT", "/v1/prompts/ada"), ("DELETE", "/v1/prompts/ada"),
    ("POST", "/v1/prompts/ada/pin"), ("POST", "/v1/prompts/ada/unpin"), ("POST", "/v1/prompts/ada/unload"),
    ("GET", "/v1/stats"), ("GET", "/metrics"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
def test_administration_takes_an_admin_key(client_of, keys, engine, method, path):
    client = client_of(Access(keys))
    for key in (ADA, ANY):
        assert error(client.request(method, path, headers=bearer(key)), 403)["code"] == "permission_denied"
    assert "ada" in engine.registry and engine.residency.pins == set()
    assert client.request(method, path, headers=bearer(ADMIN)).status_code in (200, 204, 400)  # 400: an empty upload


def test_a_key_is_compared_with_all_keys(keys, monkeypatch):
    access, compared = Access(keys), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for key in (ADA, ADMIN, "nobody"):
        compared.clear()
        access.authenticate(b"Bearer " + key.encode())
        assert len(compared) == 4


def test_keys_are_not_kept(keys):
    access = Access(keys, api_keys=["a plain key of the environment"])
    assert ADA not in repr(vars(access)) and "a plain key" not in repr(vars(access))


def test_json_and_the_environment(tmp_path, monkeypatch, client_of):
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [{"name": "ada", "key": ADA, "prompts": ["ada"]}]}))
    digest = hashlib.sha256(ANY.encode()).hexdigest()
    monkeypatch.setenv("FASTPROMPT_API_KEYS", f" {BOB},sha256:{digest} ")
    monkeypatch.setenv("FASTPROMPT_ADMIN_KEYS", ADMIN)
    access = Access(tmp_path / "keys.json", env.api_keys(), env.admin_keys())
    for key, admin in ((ADA, False), (BOB, False), (ANY, False), (ADMIN, True)):
        caller = access.authenticate(f"bearer  {key} ".encode())
        assert caller is not None and caller.admin is admin and caller.may_use("ada")
        assert caller.may_use("bob") is (key != ADA)
    assert BOB not in str(env.in_force()) and env.in_force()["FASTPROMPT_API_KEYS"] == "***"
    monkeypatch.delenv("FASTPROMPT_API_KEYS")
    assert env.api_keys() == [] and Access().open and not access.open


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        ("keys = 3", "keys"),
        ("[[keys]]\nname='a'\nprompts=['x']", "either key or sha256"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'\nsha256='{'0' * 64}'\nprompts=[]", "either key or sha256"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'", "prompts"),
        ("[[keys]]\nname='a'\nkey='short'\nprompts=[]", "at least 16"),
        ("[[keys]]\nname='a'\nkey=' spaces around the key '\nprompts=[]", "ASCII"),
        ("[[keys]]\nname='a'\nsha256='XYZ'\nprompts=[]", "sha256"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'\nprompts=[]\nrequests_per_minute=0", "requests_per_minute"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'\nprompts=[]\ntypo=1", "typo"),
        (f"[[admin_keys]]\nname='a'\nkey='{ADA}'\nprompts=['x']", "prompts"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'\nprompts=[]\n[[admin_keys]]\nname='b'\nkey='{ADA}'", "same key"),
        (f"[[keys]]\nname='a'\nkey='{ADA}'\nprompts=[]\n[[admin_keys]]\nname='a'\nkey='{BOB}'", "two keys are named"),
        ("[[keys]\n", "neither TOML nor JSON"),
        ("\x00", "neither TOML nor JSON"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, said):
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        Access(tmp_path / "keys.toml")
    assert ADA not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="at least 16"):
        Access(api_keys=["short"])


def test_reloading(keys, engine, client_of):
    access = Access(keys)
    client = client_of(access)
    asked = {"model": "eve", "prompt": "x"}
    assert client.post("/v1/completions", json=asked, headers=bearer(ADA)).status_code == 404
    before = access.authenticate(f"Bearer {BOB}".encode())
    keys.write_text(TOML.replace('prompts = ["ada"]', 'prompts = ["eve"]').replace(ANY, "another-key-0123456789"))
    access.reload()
    assert client.post("/v1/completions", json=asked, headers=bearer(ADA)).status_code == 200
    assert client.post("/v1/completions", json=asked, headers=bearer(ANY)).status_code == 401
    assert access.authenticate(f"Bearer {BOB}".encode()) is before  # with what it has used of its limits
    for wrong in ("", "[[keys]"):
        keys.write_text(wrong)
        with pytest.raises(ConfigError):
            access.reload()
        assert client.post("/v1/completions", json=asked, headers=bearer(ADA)).status_code == 200
        assert client.get("/v1/models").status_code == 401  # never open by mistake


def test_without_keys_it_listens_to_this_machine_only(keys):
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1", "[::1]"):
        assert is_loopback(host)
        assert binding(host, 1, Access()).hosts is not None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"):
        with pytest.raises(ArgumentError, match="--insecure"):
            binding(host, 1, Access())
        assert binding(host, 1, Access(), insecure=True).hosts is None
        assert binding(host, 1, Access(keys)).hosts is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_stay_out(client_of, headers, status):
    place = binding("127.0.0.1", 1, Access())
    client = client_of(options=Options(hosts=place.hosts), base_url="http://127.0.0.1")
    assert client.get("/v1/models", headers=headers).status_code == status
