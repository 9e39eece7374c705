"""Uploads that nobody has checked: refused with a reason, whatever they are, and nothing is written."""

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency_tools import backbone, constant, embedding, files, spec
from safetensors.torch import load, save

from fastprompt import Cartridge, PTuning, PTuningV2, peft_format
from fastprompt.errors import FastPromptError, IncompatiblePromptError, PromptFileError, UnsupportedError
from fastprompt.prompt_format import METADATA, WEIGHTS, prompt_files, sha256
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.uploads import MAX_BYTES, parse_upload
from fastprompt.spec import BackboneSpec, LayerShape


@pytest.mark.parametrize(
    "fields",
    [dict(task_type=5), dict(task_type=["SEQ_CLS"]), dict(task_type="\ud800"), dict(modules_to_save=True),
     dict(modules_to_save=[1])],
)  # fmt: skip
def test_an_adapter_that_says_nonsense_leaves_the_former_version(registry, tmp_path, fields):
    kept = registry.put("a", files(1))
    peft_format.write_peft(tmp_path / "adapter", constant(2))
    adapter = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    config = json.loads(adapter["adapter_config.json"]) | fields
    adapter["adapter_config.json"] = json.dumps(config).encode()
    adapter["adapter_model.safetensors"] = save(
        load(adapter["adapter_model.safetensors"]) | {"base_model.classifier.weight": torch.ones(2, 32)}
    )
    with pytest.raises(PromptFileError, match=r"task_type|modules_to_save|half a character"):
        registry.put("a", adapter)
    assert registry.current("a").version == kept.version and registry.load(kept)


@pytest.mark.parametrize("label", ["\ud800", "good\udfff"])
def test_labels_that_no_answer_can_hold_are_refused(registry, label):
    stored = files(1)
    stored[METADATA] = stored[METADATA].replace(b'"labels": null', json.dumps({"labels": [label]})[1:-1].encode())
    with pytest.raises(PromptFileError, match="half a character"):
        registry.put("a", stored)


def test_links_are_read_and_never_written_through(registry, tmp_path):
    registry.put("a", files(1))
    (registry.folder / "alias").symlink_to("a")
    (registry.folder / "dangling").symlink_to(tmp_path / "elsewhere")
    (registry.folder / "loop").symlink_to("loop")
    opened = PromptRegistry(registry.folder, spec())
    assert opened.names() == ["a", "alias"]
    assert opened.current("alias").version == opened.current("a").version
    for name in ("alias", "dangling", "loop"):
        with pytest.raises(PromptFileError, match="is a link, which is read but not written"):
            opened.put(name, files(2))
    with pytest.raises(PromptFileError, match="is a link, which is read but not written"):
        opened.delete("alias")
    assert opened.load(opened.current("a")) and not (tmp_path / "elsewhere").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _put_in(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put_in(copy[path[0]], path[1:], new)
    return copy


STORED = {
    p.config.method: prompt_files(p)
    for p in (
        constant(1),
        embedding(1),
        Cartridge(num_virtual_tokens=3).build(spec(), seed=0),
        PTuning(num_virtual_tokens=3).build(spec(), seed=0),
        PTuningV2(num_virtual_tokens=2, layers=(0, -1)).build(spec(), seed=0),
    )
}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(STORED)), st.data())
def test_metadata_with_anything_anywhere(method, data):
    stored = STORED[method]
    metadata = json.loads(stored[METADATA])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(_places(metadata))[1:]))
        metadata = _put_in(metadata, path, data.draw(JSON))
    with contextlib.suppress(FastPromptError):
        got = parse_upload(stored | {METADATA: json.dumps(metadata).encode()}, spec(), MAX_BYTES)
        assert got[WEIGHTS] == stored[WEIGHTS]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["prefix", "embedding"]), st.data())
def test_adapter_configs_with_anything_anywhere(adapters, kind, data):
    adapter = adapters[kind]
    config = json.loads(adapter["adapter_config.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
    with contextlib.suppress(FastPromptError):
        parse_upload(adapter | {"adapter_config.json": json.dumps(config).encode()}, spec(), MAX_BYTES)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    made = {}
    for kind, prompt in (("prefix", constant(1)), ("embedding", embedding(1))):
        folder = peft_format.write_peft(tmp_path_factory.mktemp("adapters") / kind, prompt)
        made[kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return made


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.int8, torch.complex64])
def test_weights_of_other_types(dtype):
    stored = files(1)
    weights = save({name: tensor.to(dtype) for name, tensor in load(stored[WEIGHTS]).items()})
    metadata = json.loads(stored[METADATA]) | {"sha256": sha256(weights)}
    upload = {METADATA: json.dumps(metadata).encode(), WEIGHTS: weights}
    if dtype is torch.float16:
        parse_upload(upload, spec(), MAX_BYTES)
        return
    with pytest.raises(PromptFileError):
        parse_upload(upload, spec(), MAX_BYTES)


def test_a_long_lie_makes_no_long_message():
    stored = files(1)
    for field, lie in (
        ("labels", [1] * 10**6),
        ("method", "x" * 10**6),
        ("fingerprint", "y" * 10**6),
        ("record", "z" * 10**6),
    ):
        metadata = json.loads(stored[METADATA]) | {field: lie}
        with pytest.raises(PromptFileError) as caught:
            parse_upload(stored | {METADATA: json.dumps(metadata).encode()}, spec(), MAX_BYTES)
        assert len(str(caught.value)) < 1100


def test_prompts_of_other_backbones_are_refused(registry):
    other = BackboneSpec("llama", 32, 97, (LayerShape(2, 8, 8),) * 4, causal=True)
    stored = prompt_files(Cartridge(num_virtual_tokens=3).build(other, seed=0))
    with pytest.raises(IncompatiblePromptError, match=other.fingerprint()):
        registry.put("a", stored)
    config = {"peft_type": "LORA", "num_virtual_tokens": 3}
    with pytest.raises(UnsupportedError, match="LORA"):
        registry.put("a", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save({})})
    assert registry.names() == []
    assert backbone().spec == spec()
