"""The registry: names, versions, conditions, and damage that stays with the prompt that has it."""

import hashlib
import json
import os
import threading

import pytest
import torch
from residency_tools import constant, embedding, files, spec

from fastprompt import Cartridge, peft_format
from fastprompt.errors import ConflictError, PromptChangedError, PromptFileError, PromptNotFoundError
from fastprompt.prompt_format import METADATA, WEIGHTS, prompt_files
from fastprompt.serving.registry import PromptRegistry
from fastprompt.store import load_prompt


def prompts():
    labelled = embedding(1)
    labelled.labels, labelled.task_type = ("no", "yes"), "SEQ_CLS"
    return [constant(0.5, 3), labelled, Cartridge(num_virtual_tokens=5).build(spec(), seed=0)]


@pytest.mark.parametrize("prompt", prompts(), ids=lambda p: p.config.method)
def test_what_is_put_comes_back(registry, prompt):
    stored = prompt_files(prompt)
    version = registry.put("a", stored)
    assert version == registry.current("a")
    assert version.version == hashlib.sha256(stored[METADATA]).hexdigest()
    assert (version.method, version.kind, version.length) == (prompt.config.method, prompt.kind, prompt.length)
    assert (version.labels, version.task_type) == (prompt.labels, prompt.task_type)
    assert version.bytes == sum(map(len, stored.values()))
    assert version.created == os.stat(version.folder / METADATA).st_mtime
    assert torch.equal(registry.load(version).weights(), prompt.weights())
    assert torch.equal(load_prompt(version.folder, spec()).weights(), prompt.weights())


def test_names_are_sorted_and_paged(registry):
    names = [f"p{i}" for i in range(25)] + ["Ünïcode name", "a"]
    for name in names:
        registry.put(name, files(1))
    assert registry.names() == sorted(names) and len(registry) == 27
    paged, after = [], None
    while page := registry.names(after, 4):
        assert len(page) <= 4
        paged += page
        after = page[-1]
    assert paged == sorted(names)
    assert registry.names("p24", 0) == [] and registry.names("p2400") == sorted(names)[sorted(names).index("p3") :]
    assert "a" in registry and "b" not in registry and None not in registry


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\nb", "x" * 201, "\ud800", "a\u202eb", None, 3],
)
def test_names_that_are_no_names(registry, name):
    with pytest.raises(PromptFileError, match="cannot name a prompt"):
        registry.put(name, files(1))
    with pytest.raises(PromptNotFoundError):
        registry.current(name)
    assert name not in registry and registry.names() == []


def test_conditions(registry):
    with pytest.raises(ConflictError, match="is not version"):
        registry.put("a", files(1), if_match="*")
    first = registry.put("a", files(1), if_none_match=True)
    with pytest.raises(ConflictError, match="exists"):
        registry.put("a", files(2), if_none_match=True)
    second = registry.put("a", files(2), if_match=first.version)
    with pytest.raises(ConflictError, match=first.version):
        registry.put("a", files(3), if_match=first.version)
    with pytest.raises(ConflictError):
        registry.delete("a", if_match=first.version)
    assert registry.current("a") == second
    assert registry.put("a", files(3), if_match="*").version == registry.current("a").version
    assert registry.delete("a", if_match=registry.current("a").version).length == 4
    with pytest.raises(PromptNotFoundError):
        registry.delete("a")
    assert registry.names() == [] and list(registry.folder.iterdir()) == []


def test_generation_tells_of_every_change(registry):
    seen = [registry.generation]
    for act in (
        lambda: registry.put("a", files(1)),
        lambda: registry.put("a", files(2)),
        lambda: registry.put("b", files(2)),
        lambda: registry.delete("a"),
    ):
        act()
        seen.append(registry.generation)
    assert seen == sorted(set(seen))
    registry.current("b"), registry.refresh(), registry.names()
    assert registry.generation == seen[-1]


def test_other_processes_writes_are_seen(registry):
    other = PromptRegistry(registry.folder, spec())
    for value in range(50):  # as fast as the disk takes them: within one tick of the file system's clock
        assert registry.put("a", files(value)) == other.current("a")
        assert torch.equal(other.load(other.current("a")).weights(), constant(value).weights())
    before = other.generation
    registry.put("b", files(1))
    assert other.names() == ["a"] and other.refresh() and other.names() == ["a", "b"] and other.generation != before
    registry.delete("a")
    with pytest.raises(PromptNotFoundError):
        other.current("a")
    assert other.names() == ["b"]
    registry.put("a", files(3))
    assert other.current("a").length == 4 and other.names() == ["a", "b"]


def test_listing_looks_into_no_folder(registry, monkeypatch):
    for i in range(40):
        (registry.folder / f"p{i}").mkdir()
    (registry.folder / "a file").write_text("")
    (registry.folder / ".hidden").mkdir()
    registry.put("good", files(1))
    opened = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(str(path)) or real(path))
    fresh = PromptRegistry(registry.folder, spec())
    assert len(fresh) == 41 and set(opened) == {str(registry.folder)} and len(opened) == 2  # leftovers, then names
    assert fresh.current("good").length == 4
    assert len(opened) == 2
    with pytest.raises(PromptFileError, match=r"no readable prompt\.json"):
        fresh.current("p3")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / METADATA).write_text("{"),
        lambda folder: (folder / METADATA).write_text("[" * 100_000),
        lambda folder: (folder / METADATA).write_bytes(b""),
        lambda folder: (folder / METADATA).unlink(),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / METADATA).write_text(
            json.dumps(json.loads((folder / METADATA).read_text()) | {"method": "lora"})
        ),
    ],
)
def test_a_damaged_prompt_fails_alone(registry, damage):
    registry.put("bad", files(1))
    good = registry.put("good", files(2))
    damage(registry.folder / "bad")
    for reader in (registry, PromptRegistry(registry.folder, spec())):
        with pytest.raises(PromptFileError, match="bad"):
            reader.current("bad")
        assert reader.current("good") == good and reader.names() == ["bad", "good"]
    with pytest.raises(ConflictError):
        registry.put("bad", files(3), if_match=good.version)
    registry.put("bad", files(3), if_match="*")  # storing it again mends it
    assert torch.equal(registry.load(registry.current("bad")).weights(), constant(3).weights())
    damage(registry.folder / "bad")
    with pytest.raises(ConflictError):
        registry.delete("bad", if_match=good.version)
    assert registry.delete("bad") is None and registry.names() == ["good"]


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damaged_weights_are_found_when_read(registry, keep):
    version = registry.put("a", files(1))
    path = version.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PromptFileError, match=r"does not match the digest.*truncated or altered") as caught:
        registry.load(registry.current("a"))
    assert not isinstance(caught.value, PromptChangedError)


def test_only_the_version_that_was_asked_for_is_read(registry):
    first = registry.put("a", files(1))
    registry.put("a", files(2))
    with pytest.raises(PromptChangedError, match="look it up again"):
        registry.load(first)
    second = registry.current("a")
    registry.delete("a")
    with pytest.raises(PromptChangedError):
        registry.load(second)
    registry.put("a", files(2))
    assert torch.equal(registry.load(second).weights(), constant(2).weights())  # the same again


def test_a_peft_adapter_is_stored_as_a_prompt(registry, tmp_path):
    peft_format.write_peft(tmp_path / "adapter", constant(0.25, 6))
    adapter = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    version = registry.put("a", adapter | {"README.md": b"# about"})
    assert (version.method, version.length) == ("prefix_tuning", 6)
    assert sorted(path.name for path in version.folder.iterdir()) == [METADATA, WEIGHTS]
    assert torch.equal(registry.load(version).weights(), constant(0.25, 6).weights())


def test_writers_with_conditions_take_turns(tmp_path):
    """Four threads with registries of their own count in one prompt: no increment is lost."""
    start = PromptRegistry(tmp_path, spec())
    start.put("n", files(0))
    failures = []

    def count(registry):
        try:
            for _ in range(5):
                while True:
                    version = registry.current("n")
                    try:
                        value = registry.load(version).weights()[0, 0].item()
                        registry.put("n", files(value + 1), if_match=version.version)
                        break
                    except (ConflictError, PromptChangedError):
                        continue
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=count, args=(PromptRegistry(tmp_path, spec()),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert torch.equal(start.load(start.current("n")).weights(), constant(20).weights())
