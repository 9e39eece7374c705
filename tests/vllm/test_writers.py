"""Several writers of one folder of prompts and its store: in the end the store says what the folder says."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from vllm_cases import Served

from fastprompt import PrefixTuning, PromptTuning, prompt_format
from fastprompt.errors import PromptNotFoundError
from fastprompt.integrations.vllm.administration import ExportedPrompts
from fastprompt.integrations.vllm.export import export_folder
from fastprompt.integrations.vllm.store import GRACE_SECONDS, PrefixStore


def no_compiler(embeddings):
    raise AssertionError("nothing here needs the backbone")


@pytest.fixture
def versions(small: Served) -> list[dict[str, bytes]]:
    """Files of four prompts of different lengths, over an exported folder with one prompt."""
    small.add("kept", PrefixTuning(num_virtual_tokens=1))
    small.export()
    made = []
    for length in (2, 3, 4, 5):
        small.add("v", PrefixTuning(num_virtual_tokens=length), seed=length, save=False)
        made.append(prompt_format.prompt_files(small.model.library["v"]))
    return made


def server(served: Served) -> ExportedPrompts:
    """Another process's view."""
    return ExportedPrompts(PrefixStore(served.store.folder), served.prompts)


def agree(served: Served) -> None:
    registry, store = server(served)._writable(), PrefixStore(served.store.folder)
    assert store.names() == registry.names()
    for name in store.names():
        assert store.current(name).version == registry.current(name).version
        store.map(store.current(name).digest)


def between(monkeypatch, owner, method, do):
    """Let somebody do something right after a method, once."""
    original = getattr(owner, method)

    def then(*args, **kwargs):
        monkeypatch.setattr(owner, method, original)
        done = original(*args, **kwargs)
        do()
        return done

    monkeypatch.setattr(owner, method, then)


def test_the_later_of_two_uploads_stays(small, versions, monkeypatch):
    one, other = server(small), server(small)
    between(monkeypatch, one._registry, "put", lambda: other.put("a", versions[1]))
    one.put("a", versions[0])
    assert small.store.current("a").length == 3
    agree(small)


def test_a_deletion_does_not_undo_a_later_upload_nor_an_upload_a_deletion(small, versions, monkeypatch):
    one, other = server(small), server(small)
    one.put("a", versions[0])
    between(monkeypatch, one._registry, "delete", lambda: other.put("a", versions[1]))
    one.delete("a")
    assert small.store.current("a").length == 3
    between(monkeypatch, one._registry, "put", lambda: other.delete("a"))
    one.put("a", versions[0])
    with pytest.raises(PromptNotFoundError):
        small.store.current("a")
    agree(small)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_export_does_not_undo_what_happens_meanwhile(small, versions, change):
    small.add("soft", PromptTuning(num_virtual_tokens=6))
    export_folder(small.store, small.prompts, small.model._info.compile)
    small.add("soft", PromptTuning(num_virtual_tokens=7), overwrite=True)
    live, compiled = server(small), []

    def compile(embeddings):
        if not compiled:
            live.put("soft", versions[0]) if change == "replaced" else live.delete("soft")
            live.put("new", versions[1])
        compiled.append(1)
        return small.model._info.compile(embeddings)

    _, refused = export_folder(small.store, small.prompts, compile)
    assert not refused and len(compiled) == 1
    assert small.store.names() == ["kept", "new"] + (["soft"] if change == "replaced" else [])
    agree(small)


def test_exports_and_uploads_at_once(small, versions):
    """Writers take turns file by file: threads here, which the lock keeps apart as it does processes."""

    def upload(seed):
        live, draw = server(small), random.Random(seed)
        for _ in range(15):
            name = f"p{draw.randrange(3)}"
            with suppress(PromptNotFoundError):
                live.put(name, draw.choice(versions)) if draw.random() < 0.7 else live.delete(name)

    def export(_):
        for _ in range(5):
            _, refused = export_folder(PrefixStore(small.store.folder), small.prompts, no_compiler)
            assert all("times while it was exported" in why for why in refused.values())

    with ThreadPoolExecutor(4) as several:
        list(several.map(lambda job: job[0](job[1]), [(upload, 1), (upload, 2), (export, 0), (export, 0)]))
    agree(small)


def test_a_server_removes_what_replaced_prompts_left(small, versions):
    live = server(small)
    live.put("a", versions[0])
    first = small.store._prefix_path(small.store.current("a").digest)
    live.put("a", versions[1])
    past = time.time() - GRACE_SECONDS - 1
    os.utime(first, (past, past))
    live.put("a", versions[2])
    assert first.exists()  # it looks once in a while
    live._collected -= GRACE_SECONDS + 1
    live.delete("a")
    assert not first.exists()
    agree(small)


def test_a_damaged_entry_can_be_replaced_and_deleted(small, versions):
    live = server(small)
    for heal in (lambda: live.put("a", versions[1]), lambda: live.delete("a")):
        live.put("a", versions[0])
        small.store._name_path("a").write_text("{")
        assert "a" in live
        heal()
        agree(small)
    with pytest.raises(PromptNotFoundError):
        live.delete("a")
