"""The folder that vLLM reads prompts from."""

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch

from fastprompt.errors import IncompatiblePromptError, PromptFileError, PromptNotFoundError
from fastprompt.integrations.vllm.pages import Prefixes, heads_of_rank
from fastprompt.integrations.vllm.prefix_file import prefix_bytes
from fastprompt.integrations.vllm.store import Entry, PrefixStore, StoreBackbone
from fastprompt.spec import BackboneSpec, LayerShape, Prefix

SPEC = BackboneSpec("llama", 32, 97, (LayerShape(2, 8, 6),) * 3, True)
ENTRY = Entry("", 5, "v", "prefix_tuning", "prefix", 10, None, 1.0)


def prefix(seed: int = 0, length: int = 5) -> Prefix:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (tuple(torch.randn(2, length, dim, generator=draw) for _ in range(3)) for dim in (8, 6))
    return Prefix((0, 1, 2), keys, values)


@pytest.fixture
def store(tmp_path) -> PrefixStore:
    made = PrefixStore(tmp_path / "store")
    made.open_for(StoreBackbone("somewhere", "float32", SPEC))
    return made


def put(store: PrefixStore, name: str, seed: int = 0) -> str:
    digest = store.write_prefix(prefix_bytes(prefix(seed), torch.float32))
    store.set_name(name, replace(ENTRY, digest=digest))
    return digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prefix_is_mapped_token_by_token(store, dtype):
    mapped = store.map(store.write_prefix(prefix_bytes(prefix(), dtype)))
    assert mapped.length == 5 and mapped.keys.shape == (3, 5, 2, 8) and mapped.values.shape == (3, 5, 2, 6)
    for layer in range(3):
        assert torch.equal(mapped.keys[layer], prefix().keys[layer].transpose(0, 1).to(dtype))
        assert torch.equal(mapped.values[layer], prefix().values[layer].transpose(0, 1).to(dtype))


def test_a_mapped_prefix_holds_no_descriptor(store):
    """Thousands are mapped by one process, and a process may often open a thousand files only."""
    digest = put(store, "a")
    held = len(os.listdir("/proc/self/fd"))
    mapped = [store.map(digest) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == held
    assert all(torch.equal(m.keys, mapped[0].keys) for m in mapped)


def test_names_are_found_by_other_objects_over_the_folder(store):
    other = PrefixStore(store.folder)
    assert other.names() == []
    first = put(store, "b")
    put(store, "a", 1)
    assert other.names() == ["a", "b"]
    assert other.current("b").ticket.digest == first
    put(store, "b", 2)
    assert other.current("b").digest != first
    store.remove_name("b")
    store.remove_name("b")
    with pytest.raises(PromptNotFoundError):
        other.current("b")
    for name in ("../store", "a/b", "", ".a", "a\0"):
        with pytest.raises(PromptNotFoundError):
            other.current(name)
    assert other.names() == ["a"]


def test_prefixes_without_names_are_kept_a_while(store):
    old = put(store, "a")
    new = put(store, "a", 1)
    assert store.collect() == 0
    past = time.time() - 7200
    for digest in (old, new):
        os.utime(store._prefix_path(digest), (past, past))
    put(store, "b", 2)
    assert store.collect() == 1
    assert [store.has_prefix(digest) for digest in (old, new)] == [False, True]


def test_equal_prefixes_are_one_file(store):
    assert put(store, "a") == put(store, "b")
    store._prefix_path(store.current("a").digest).write_bytes(b"damaged")
    put(store, "a")
    store.map(store.current("a").digest)


@pytest.mark.parametrize("harm", [lambda b: b[:50], lambda b: b"", lambda b: b[:-1] + b"\0", lambda b: b + b"\0"])
def test_a_damaged_file_is_told(store, harm):
    path = store._prefix_path(put(store, "a"))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(PromptFileError, match=r"does not match its digest|cannot be mapped"):
        store.map(store.current("a").digest)
    with pytest.raises(PromptFileError, match="does not exist"):
        store.map("0" * 64)


def test_links_are_followed_to_what_they_lead_to_now(store, tmp_path):
    path, elsewhere = store._prefix_path(put(store, "a")), tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    prefixes, digest = Prefixes(store, SPEC), store.current("a").digest
    assert prefixes.get(digest).length == 5
    elsewhere.write_bytes(elsewhere.read_bytes()[:-1] + b"\0")
    with pytest.raises(PromptFileError, match="does not match"):
        prefixes.get(digest)
    path.unlink()
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to(path), path.mkdir):  # none is waited for
        make()
        with pytest.raises(PromptFileError):
            prefixes.get(digest)
        path.rmdir() if path.is_dir() else path.unlink()


def test_what_is_mapped_is_looked_at_again_when_its_file_changes(store):
    digest = put(store, "a")
    prefixes = Prefixes(store, SPEC, capacity=2)
    first = prefixes.get(digest)
    assert prefixes.get(digest) is first
    path = store._prefix_path(digest)
    os.utime(path)
    assert torch.equal(prefixes.get(digest).keys, first.keys)
    assert prefixes.mapped == 2
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PromptFileError):
        prefixes.get(digest)
    path.unlink()
    with pytest.raises(PromptFileError):
        prefixes.get(digest)
    for seed in range(3):
        prefixes.get(put(store, "b", seed + 5))
    assert len(prefixes) == 2


def test_a_prefix_of_another_backbone_is_told(store):
    digest = store.write_prefix(prefix_bytes(prefix(), torch.float32))
    assert Prefixes(store, SPEC).get(digest).length == 5
    for layers in ((LayerShape(2, 8, 6),) * 2, (LayerShape(1, 8, 6),) * 3, (LayerShape(2, 8, 8),) * 3):
        with pytest.raises(PromptFileError, match=r"holds \(3, 5, 2, [68]\), this backbone's prefixes are"):
            Prefixes(store, replace(SPEC, layers=layers)).get(digest)


def test_a_store_is_one_backbones(store, tmp_path):
    held = store.backbone()
    store.open_for(held)
    for other in (replace(held, dtype="bfloat16"), replace(held, spec=replace(SPEC, hidden_size=64))):
        with pytest.raises(IncompatiblePromptError, match="export into another folder"):
            store.open_for(other)
    with pytest.raises(PromptFileError, match="fastprompt export"):
        PrefixStore(tmp_path).backbone()
    (store.folder / "backbone.json").write_text('{"format": 2}')
    with pytest.raises(PromptFileError, match="has format 2"):
        store.backbone()


def test_damaged_entries_are_told(store):
    put(store, "a")
    path = store.folder / "names" / "a.json"
    whole = json.loads(path.read_text())
    wrong = [whole | change for change in ({"digest": 1}, {"digest": "../a"}, {"length": "5"}, {"length": 0}, {"x": 1})]
    for text in ("{", "[]", '{"digest": 1}', *map(json.dumps, wrong)):
        path.write_text(text)
        with pytest.raises(PromptFileError, match=r"a\.json"):
            store.current("a")
    shutil.rmtree(store.folder / "names")
    (store.folder / "names").write_text("no folder")
    for call in (store.names, lambda: store.current("a"), lambda: store.set_name("a", ENTRY), store.collect):
        with pytest.raises(PromptFileError, match="names"):
            call()


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_hold_all_heads_and_as_many_each(heads, ranks):
    held = [heads_of_rank(heads, ranks, rank) for rank in range(ranks)]
    shares = [list(range(heads))[share] for share in held]
    assert {len(share) for share in shares} == {max(1, heads // ranks)}
    copies = max(1, ranks // heads)
    assert sorted(head for share in shares for head in share) == sorted(list(range(heads)) * copies)
