"""Prompts that cannot be served: each fails alone, once a request, and says why."""

import threading

import pytest
import torch
import zoo
from residency_tools import WAIT, backbone, embedding, files, holds, settle, spec, token_bytes

from fastprompt import Cartridge, PrefixTuning, PromptedModel, PTuning
from fastprompt.errors import (
    FastPromptError,
    IncompatiblePromptError,
    PromptFileError,
    PromptNotFoundError,
    UnsupportedError,
)
from fastprompt.prompt_format import METADATA, WEIGHTS, prompt_files
from fastprompt.serving import pipeline
from fastprompt.serving.host_copy import HostCopy
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency
from fastprompt.spec import BackboneSpec, LayerShape, Prefix


@pytest.fixture
def registry(tmp_path):
    made = PromptRegistry(tmp_path / "prompts", spec())
    made.put("good", files(1))
    return made


@pytest.fixture
def residency(registry):
    made = Residency(backbone(), registry, device_bytes=32 * token_bytes())
    yield made
    made.close()


def fails(residency, name, error, match):
    """Twice, since every request tries anew; and the good prompt is served in between."""
    for _ in range(2):
        with pytest.raises(error, match=match):
            settle(residency, name)
        lease = settle(residency, "good")
        assert holds(residency, lease, 1)
        lease.release()


def store(registry, name, stored):
    """Put files there without the checks of `put`, as another program may."""
    folder = registry.folder / name
    folder.mkdir()
    for file, content in stored.items():
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_truncated_weights(registry, residency, keep):
    path = registry.put("bad", files(2)).folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    fails(residency, "bad", PromptFileError, "does not match the digest")
    assert residency.stats().disk.failures == 2


def test_vanished_weights(registry, residency):
    (registry.put("bad", files(2)).folder / WEIGHTS).unlink()
    fails(residency, "bad", PromptFileError, r"missing|no readable prompt\.safetensors")


def test_vanished_and_altered_metadata(registry, residency):
    path = registry.put("bad", files(2)).folder / METADATA
    path.write_text("{}")
    fails(residency, "bad", PromptFileError, "no format_version")
    path.unlink()
    fails(residency, "bad", PromptFileError, r"no readable prompt\.json")


def test_prompts_of_another_backbone(registry, residency):
    other = BackboneSpec("llama", 32, 97, (LayerShape(2, 8, 8),) * 4, causal=True)
    store(registry, "bad", prompt_files(Cartridge(num_virtual_tokens=3).build(other, seed=0)))
    fails(residency, "bad", IncompatiblePromptError, other.fingerprint())


def test_virtual_tokens_in_place(registry, residency):
    prompt = PTuning(num_virtual_tokens=3, in_place=True).build(spec(), seed=0)
    registry.put("bad", prompt_files(prompt))
    fails(residency, "bad", UnsupportedError, "among the text's own")


def test_numbers_too_large_for_the_backbone(tmp_path):
    half = PromptedModel(zoo.causal("llama").half())._info
    registry = PromptRegistry(tmp_path, half.spec)
    config = PrefixTuning(num_virtual_tokens=2)
    for name, value in (("bad", 1e30), ("good", 1.0)):
        weights = torch.full((2, config.width(half.spec)), value)
        registry.put(name, prompt_files(config.restore(half.spec, weights)))
    residency = Residency(half, registry, device_bytes=10**5)
    try:
        fails(residency, "bad", PromptFileError, "NaN or infinity as torch.float16")
    finally:
        residency.close()


def test_parts_of_an_encoder_decoder(tmp_path):
    model = PromptedModel(zoo.seq2seq("t5"))._info
    registry = PromptRegistry(tmp_path, model.spec)
    for name, parts in (("bad", ("decoder", "encoder")), ("good", ("decoder",))):
        prompt = PrefixTuning(num_virtual_tokens=2, parts=parts).build(model.spec, seed=0)
        registry.put(name, prompt_files(prompt))
    registry.put("embedding", prompt_files(PTuning(num_virtual_tokens=2).build(model.spec, seed=0)))
    residency = Residency(model, registry, device_bytes=10**5)
    try:
        for name, match in (("bad", "enters an encoder"), ("embedding", "cannot turn into a prefix")):
            with pytest.raises(UnsupportedError, match=match):
                settle(residency, name)
        assert settle(residency, "good").extent.layers == tuple(range(model.spec.num_layers))
    finally:
        residency.close()


def test_a_backbone_that_cannot_compile_one_prompt(registry, residency, monkeypatch):
    registry.put("bad", prompt_files(embedding(1, 5)))
    registry.put("fine", prompt_files(embedding(1, 4)))
    real = type(backbone()).compile

    def compile(self, embeddings):
        if embeddings[0].shape[0] == 5:
            raise RuntimeError("out of memory")
        return real(self, embeddings)

    monkeypatch.setattr(type(backbone()), "compile", compile)
    fails(residency, "bad", PromptFileError, "could not be compiled.*out of memory")
    settle(residency, "fine").release()


def test_a_thread_outlives_everything(registry, residency, monkeypatch):
    registry.put("bad", files(2))
    real = registry.load

    def load(version):
        if version.name == "bad":
            raise MemoryError("no memory")
        return real(version)

    monkeypatch.setattr(registry, "load", load)
    fails(residency, "bad", PromptFileError, r"could not be read: MemoryError\('no memory'\)")


@pytest.mark.parametrize("name", ["nobody", "", "../good", ".good", "x" * 300, "a\nb"])
def test_unknown_names(residency, name):
    for _ in range(2):
        with pytest.raises(PromptNotFoundError, match="not registered"):
            residency.acquire(name)


@pytest.mark.parametrize("act", ["replace", "delete", "recreate", "damage"])
def test_a_prompt_that_changes_while_it_is_read(registry, residency, monkeypatch, act):
    """The thread has begun with one version; what a lease then holds is never that one."""
    registry.put("a", files(2))
    gate, entered = threading.Event(), threading.Event()
    real = registry.load

    def load(version):
        entered.set()
        assert gate.wait(WAIT)
        return real(version)

    monkeypatch.setattr(registry, "load", load)
    assert residency.acquire("a") is None and entered.wait(WAIT)
    if act in ("delete", "recreate"):
        registry.delete("a")
    if act in ("replace", "recreate"):
        registry.put("a", files(3))
    if act == "damage":
        (registry.folder / "a" / WEIGHTS).write_bytes(b"")
    gate.set()
    if act in ("replace", "recreate"):
        assert holds(residency, settle(residency, "a"), 3)
        assert residency.stats().disk.failures == 0
    else:
        with pytest.raises(PromptNotFoundError if act == "delete" else PromptFileError):
            settle(residency, "a")


def test_what_was_dropped_while_it_was_read_is_not_kept(registry, residency, monkeypatch):
    registry.put("a", files(2))
    gate, entered, left = threading.Event(), threading.Event(), threading.Event()
    real = registry.load

    def load(version):
        prompt = real(version)
        entered.set()
        assert gate.wait(WAIT)
        return prompt

    monkeypatch.setattr(registry, "load", load)
    assert residency.acquire("a") is None and entered.wait(WAIT)
    registry.delete("a")
    residency.drop("a")
    residency.progress()
    residency.on_ready = left.set
    gate.set()
    assert left.wait(WAIT)
    residency.progress()
    stats = residency.stats()
    assert (stats.loading, stats.host.prompts, stats.device.prompts, stats.disk.loads) == (0, 0, 0, 1)


@pytest.mark.parametrize("kind", ["prefix", "embedding"])
def test_a_prompt_replaced_after_it_was_read(registry, residency, kind):
    """Read, not claimed yet, perhaps not compiled yet: the old version is not served, and leaves memory."""
    registry.put("a", files(2) if kind == "prefix" else prompt_files(embedding(1)))
    assert residency.acquire("a") is None
    ready = threading.Event()
    residency.on_ready = ready.set
    while not residency.progress():
        ready.wait(WAIT)
    registry.put("a", files(3))
    residency.drop("a")
    residency.progress()
    assert residency.stats().loading == 0
    assert holds(residency, settle(residency, "a"), 3)
    assert residency.stats().host.prompts == 1


def test_a_damaged_copy_of_a_shared_content_fails_under_its_name_only(registry, residency):
    registry.put("twin", files(1))
    (registry.folder / "twin" / WEIGHTS).write_bytes(b"")
    with pytest.raises(PromptFileError, match="twin"):
        settle(residency, "twin")
    assert holds(residency, settle(residency, "good"), 1)
    assert residency.acquire("twin") is not None  # the content is known now, and it is the same


def test_errors_that_nobody_asks_for_do_not_pile_up(registry, residency, monkeypatch):
    monkeypatch.setattr(pipeline, "_ERRORS", 3)
    for i in range(6):
        (registry.put(f"bad{i}", files(i)).folder / WEIGHTS).write_bytes(b"")
        assert residency.acquire(f"bad{i}") is None
        while residency.stats().loading:
            residency.progress()
    assert len(residency._pipeline._failed) == 3
    with pytest.raises(FastPromptError):
        residency.acquire("bad5")


def test_closing_ends_the_threads(registry):
    before = threading.active_count()
    residency = Residency(backbone(), registry, device_bytes=10**5, loaders=3)
    assert threading.active_count() == before + 3
    residency.acquire("good")
    residency.close()
    assert threading.active_count() == before


def test_a_copy_owns_its_memory():
    """What the host tier counts is what it keeps."""
    base = torch.zeros(1000, 64)
    copy = HostCopy.pack(Prefix((0,), (base[:2].view(2, 4, 16),), (base[2:4].view(2, 4, 16),)))
    assert sum(t.untyped_storage().nbytes() for t in copy.packed.codes) == copy.nbytes == 2 * 2 * 64 * 4


def test_mended_before_anybody_heard_of_the_damage(registry, residency):
    weights = registry.put("bad", files(2)).folder / WEIGHTS
    weights.write_bytes(b"")
    assert residency.acquire("bad") is None  # and whoever asked goes away
    while residency.stats().disk.failures == 0:
        residency.progress()
    registry.put("bad", files(2))
    residency.drop("bad")
    assert holds(residency, settle(residency, "bad"), 2)


def test_mended_while_the_damage_is_being_read(registry, residency, monkeypatch):
    registry.put("bad", files(2)).folder.joinpath(WEIGHTS).write_bytes(b"")
    reading, mended, load = threading.Event(), threading.Event(), registry.load

    def slow(version):
        try:
            return load(version)
        except PromptFileError:
            reading.set()
            assert mended.wait(WAIT)
            raise

    monkeypatch.setattr(registry, "load", slow)
    assert residency.acquire("bad") is None
    assert reading.wait(WAIT)
    registry.put("bad", files(2))
    residency.drop("bad")
    residency.progress()
    mended.set()
    assert holds(residency, settle(residency, "bad"), 2)
    assert residency.stats().disk.failures == 0
