"""vLLM's HTTP server with prompts: by name, for those who may, and administered as the embedded server's are."""

import io
import json
import zipfile

import pytest
import vllm_cases
import vllm_server
from vllm_cases import NAME

from fastprompt import PrefixTuning, PromptTuning, prompt_format
from fastprompt.prompts import PromptHead

ADMIN, USER = "an admin key for tests", "a user's key for tests"
TEXT, IDS = "w44 w55 w66", (44, 55, 66)
NEW = 8


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    served = vllm_cases.serve(tmp_path_factory.mktemp("http"), lengths=(1, 20, 64))
    return served


@pytest.fixture(scope="module")
def admin(own, tmp_path_factory):
    keys = {"FASTPROMPT_ADMIN_KEYS": ADMIN.replace(" ", "-"), "FASTPROMPT_API_KEYS": USER.replace(" ", "-")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPROMPT_VLLM_SECRET", vllm_cases.SECRET)
        with vllm_server.running(own, tmp_path_factory.mktemp("log"), **keys) as client:
            yield client.with_key(ADMIN.replace(" ", "-"))


@pytest.fixture(scope="module")
def user(admin):
    return admin.with_key(USER.replace(" ", "-"))


def words(answer, place="text"):
    return [int(word[1:]) for word in answer["choices"][0][place].split()]


def complete(client, model, prompt=TEXT, **more):
    return client.post(
        "/v1/completions",
        **{"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True} | more,
    )


def expected(own, name, ids=IDS):
    """What is said, without the special tokens that are not shown."""
    return [token for token in own.expected([(name, tuple(ids))], NEW)[0] if token > 2]


def test_completions_under_every_prompt(own, user):
    for name in [*own.names, None]:
        answer = complete(user, name or NAME)
        assert answer.status == 200, answer
        assert words(answer) == expected(own, name)
        assert answer["model"] == (name or NAME)
        assert answer["usage"]["prompt_tokens"] == len(IDS)
        assert answer["usage"]["total_tokens"] == len(IDS) + NEW
    several = complete(user, "prefix20", [[44, 55], [44, 55, 66]])
    assert several["usage"]["prompt_tokens"] == 5
    assert [c["text"].strip() for c in several["choices"]] == [
        " ".join(f"w{t}" for t in expected(own, "prefix20", ids)) for ids in ((44, 55), IDS)
    ]


def test_streams_count_text_only(own, user):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "prefix64", "prompt": TEXT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    chunks = user.stream("/v1/completions", **body, stream_options=options)
    said = "".join(c["choices"][0]["text"] for c in chunks if c["choices"])
    assert [int(w[1:]) for w in said.split()] == expected(own, "prefix64")
    assert {c["model"] for c in chunks} == {"prefix64"}
    assert {c["usage"]["prompt_tokens"] for c in chunks} == {len(IDS)}


def test_chats(own, user):
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    answer = user.post("/v1/chat/completions", model="prefix20", **body)
    assert answer.status == 200, answer
    said = [int(word[1:]) for word in answer["choices"][0]["message"]["content"].split()]
    assert said == expected(own, "prefix20")
    assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("prefix20", len(IDS))
    chunks = user.stream("/v1/chat/completions", model="p64", **body, stream_options={"include_usage": True})
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert [int(w[1:]) for w in said.split()] == expected(own, "p64")
    assert chunks[-1]["usage"]["prompt_tokens"] == len(IDS)
    assert {c["model"] for c in chunks} == {"p64"}


def test_what_a_client_says_of_transfers_and_salts_changes_nothing(own, user, admin):
    stolen = {"kv_transfer_params": {"fastprompt": "prefix20", "do_remote_prefill": True}, "cache_salt": "mine"}
    assert words(complete(user, "prefix64", **stolen)) == expected(own, "prefix64")
    assert words(complete(user, NAME, **stolen)) == expected(own, None)
    entry = own.store.current("prefix20")
    forged = f"fp1-{entry.digest}-{entry.length}-00000000-{'0' * 32}"
    assert words(complete(user, NAME, cache_salt=forged)) == expected(own, None)
    assert words(complete(user, "prefix20", cache_salt=forged)) == expected(own, "prefix20")
    xargs = {"vllm_xargs": {"kv_transfer_params": "prefix20"}}
    assert words(complete(user, NAME, **xargs)) == expected(own, None)
    tokens = {"token_ids": list(IDS), "sampling_params": {"max_tokens": NEW, "temperature": 0}, "cache_salt": forged}
    assert user.post("/inference/v1/generate", **tokens).status == 403
    answer = admin.post("/inference/v1/generate", **tokens)
    assert answer.status >= 400 or answer["choices"][0]["token_ids"] == []  # vLLM 0.28 says so of a failed request
    assert words(complete(user, "prefix20")) == expected(own, "prefix20")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"echo": True}, "echo is not supported under a prompt"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is not supported under a prompt"),
        ({"use_beam_search": True, "n": 2}, "beam search is not supported"),
        ({"prompt": []}, ""),
        ({"prompt": [3] * 495}, "the text has 495 tokens and its prompt 20, the model takes 512"),
    ],
)
def test_what_no_prompt_can_be_right_under_is_refused(own, user, body, said):
    answer = complete(user, "prefix20", **body)
    assert answer.status == 400
    assert said in answer["error"]["message"]
    assert words(complete(user, "prefix20")) == expected(own, "prefix20")


def test_an_answer_ends_where_the_model_does(user):
    answer = complete(user, "prefix20", [3] * 480, max_tokens=30, min_tokens=30)
    assert answer["usage"]["completion_tokens"] == 512 - 20 - 480
    assert answer["choices"][0]["finish_reason"] == "length"


def test_models_and_unknown_names(own, user):
    listed = user.call("GET", "/v1/models")
    assert [m["id"] for m in listed["data"]] == [NAME, *sorted(own.names)]
    assert user.call("GET", "/v1/models/prefix20")["parent"] == NAME
    for name in ("nobody", "../prompts", "a/b", ".vllm", ""):
        if name:
            assert complete(user, name).status == 404
    assert complete(user, "nobody")["error"]["code"] == "model_not_found"


def test_keys(own, user, admin):
    nobody = vllm_server.Client(user.port)
    for path in ("/v1/models", "/v1/prompts", "/metrics", "/version"):
        assert nobody.call("GET", path).status == 401
    assert complete(nobody, "prefix20").status == 401
    assert user.call("GET", "/v1/prompts").status == 403
    assert admin.call("GET", "/v1/prompts").status == 200
    for path in ("/metrics", "/load", "/nothing"):
        assert user.call("GET", path).status == 403
    assert [user.call("GET", path).status for path in ("/version", "/health")] == [200, 200]
    assert nobody.call("GET", "/health").status == 200


def archive(own, name) -> bytes:
    files = prompt_format.prompt_files(own.model.library[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for file, content in files.items():
            out.writestr(file, content)
    return packed.getvalue()


def test_prompts_come_change_and_go_while_it_runs(own, admin, user):
    own.add("new", PrefixTuning(num_virtual_tokens=33), seed=50, save=False)
    own.add("embedded", PromptTuning(num_virtual_tokens=17), seed=51, save=False)
    for name in ("new", "embedded"):
        put = admin.call("PUT", f"/v1/prompts/{name}", archive(own, name))
        assert put.status == 201, put
        assert words(complete(user, name)) == expected(own, name)
    first = admin.call("GET", "/v1/prompts/new")
    assert (first["method"], first["length"]) == ("prefix_tuning", 33)
    own.add("new", PrefixTuning(num_virtual_tokens=33), seed=60, save=False)
    assert admin.call("PUT", "/v1/prompts/new", archive(own, "new"), if_match='"0"').status == 412
    assert admin.call("PUT", "/v1/prompts/new", archive(own, "new"), if_none_match="*").status == 412
    put = admin.call("PUT", "/v1/prompts/new", archive(own, "new"), if_match=first.headers["etag"])
    assert put.status == 200, put
    assert words(complete(user, "new")) == expected(own, "new")
    assert admin.call("DELETE", "/v1/prompts/new").status == 204
    assert complete(user, "new").status == 404
    assert admin.call("GET", "/v1/prompts/new").status == 404
    assert admin.call("DELETE", "/v1/prompts/new").status == 404
    assert "new" not in [m["id"] for m in user.call("GET", "/v1/models")["data"]]
    assert words(complete(user, "embedded")) == expected(own, "embedded")


def test_a_prompt_that_is_deleted_answers_who_asked_before(own, admin, user):
    new = 400
    own.add("going", PrefixTuning(num_virtual_tokens=33), seed=70, save=False)
    assert admin.call("PUT", "/v1/prompts/going", archive(own, "going")).status == 201
    body = {"model": "going", "prompt": list(IDS), "max_tokens": new, "temperature": 0, "ignore_eos": True}
    with user.open("POST", "/v1/completions", body | {"stream": True, "return_token_ids": True}) as response:
        lines = [response.readline()]
        assert admin.call("DELETE", "/v1/prompts/going").status == 204
        assert complete(user, "going").status == 404
        lines += response.readlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    said = [token for event in events for choice in event["choices"] for token in choice["token_ids"] or ()]
    assert said == own.expected([("going", IDS)], new)[0]


def test_uploads_that_vllm_cannot_hold_are_refused(own, admin):
    prompt = own.model.library["prefix20"].collapse()
    prompt.head = PromptHead("score", {"weight": prompt.weights()[:2, :2].clone()})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for file, content in prompt_format.prompt_files(prompt).items():
            out.writestr(file, content)
    answer = admin.call("PUT", "/v1/prompts/headed", packed.getvalue())
    assert answer.status == 400
    assert "a head of its own" in answer["error"]["message"]
    assert admin.call("PUT", "/v1/prompts/broken", b"PK\x03\x04 no archive").status == 400
    assert admin.call("PUT", f"/v1/prompts/{NAME}", archive(own, "prefix20")).status == 409


def test_a_damaged_prompt_fails_alone_and_in_words(own, user):
    path = own.store._prefix_path(own.store.current("prefix1").digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        answer = complete(user, "prefix1")
        assert (answer.status, answer["error"]["code"]) == (503, "prompt_unreadable")
        assert words(complete(user, "prefix64")) == expected(own, "prefix64")
        streamed = user.stream("/v1/completions", model="prefix1", prompt=TEXT, max_tokens=NEW)
        assert "cannot be read" in streamed[-1]["error"]["message"]
    finally:
        path.write_bytes(whole)
    assert words(complete(user, "prefix1")) == expected(own, "prefix1")
