"""PromptBank: layout, names, conversion and refusals."""

import time

import pytest
import torch
from bank_tools import EQUAL, RAGGED, TOKEN_BYTES, assert_unchanged, filled, holds, make_prefix, snapshot

from fastprompt.bank import PromptBank
from fastprompt.errors import ArgumentError, DuplicatePromptError, PromptNotFoundError
from fastprompt.spec import Prefix


@pytest.mark.parametrize("shapes", [EQUAL, RAGGED])
def test_what_was_put_is_read_back(shapes):
    bank = PromptBank(shapes)
    prefixes = {f"p{n}": make_prefix(n, shapes, seed=n) for n in (1, 7, 200, 33)}
    for name, prefix in prefixes.items():
        entry = bank.put(name, prefix, f"digest of {name}")
        assert (entry.name, entry.version) == (name, f"digest of {name}")
    assert all(holds(bank, bank.get(name), prefix) for name, prefix in prefixes.items())
    assert len(bank) == 4
    assert "p7" in bank
    assert "p8" not in bank
    assert all(bank.keys(i).shape == (s.kv_heads, bank.stats().capacity, s.key_dim) for i, s in enumerate(shapes))
    assert all(bank.values(i).shape == (s.kv_heads, bank.stats().capacity, s.value_dim) for i, s in enumerate(shapes))


def test_equal_layers_are_one_contiguous_block():
    bank = PromptBank(EQUAL, bytes=10 * TOKEN_BYTES)
    flat = torch.as_strided(bank.keys(0), (3, 2, 2, 10, 4), (160, 80, 40, 4, 1), 0)
    flat.copy_(torch.arange(480.0).view(3, 2, 2, 10, 4))
    for layer in range(3):
        assert torch.equal(bank.keys(layer), flat[layer, 0])
        assert torch.equal(bank.values(layer), flat[layer, 1])


def test_a_prompt_on_some_layers_leaves_the_others_alone():
    bank = PromptBank(RAGGED, bytes=10_000)
    for layer in range(3):
        bank.keys(layer).fill_(torch.nan)
        bank.values(layer).fill_(torch.nan)
    prefix = make_prefix(5, RAGGED, layers=(2, 0))
    entry = bank.put("some", prefix, "v")
    assert entry.layers == (2, 0)
    assert holds(bank, entry, prefix)
    assert bank.keys(1).isnan().all()
    assert bank.values(1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_prompts_are_converted_on_the_way_in(dtype):
    bank = PromptBank(EQUAL, dtype=dtype)
    prefix = make_prefix(9)
    assert holds(bank, bank.put("a", prefix, "v"), prefix)
    assert bank.keys(0).dtype == dtype
    assert bank.stats().token_bytes == sum(s.width for s in EQUAL) * dtype.itemsize


def test_the_bank_keeps_copies():
    bank, prefix = PromptBank(EQUAL), make_prefix(4)
    kept = prefix.map(torch.clone)
    entry = bank.put("a", prefix, "v")
    for tensor in prefix.keys:
        tensor.zero_()
    assert holds(bank, entry, kept)


def test_a_trainable_or_strided_prefix_is_stored():
    wide = torch.randn(5, 2, 8, requires_grad=True)
    view = wide.transpose(0, 1)[..., ::2]  # [2, 5, 4], last stride 2
    prefix = Prefix((1,), (view,), (view,))
    bank = PromptBank(EQUAL)
    assert holds(bank, bank.put("a", prefix, "v"), prefix)
    assert not bank.keys(1).requires_grad


def test_one_device_a_layer():
    bank = PromptBank(RAGGED, devices=["cpu", torch.device("cpu"), "cpu"])
    prefix = make_prefix(3, RAGGED)
    assert holds(bank, bank.put("a", prefix, "v"), prefix)
    with pytest.raises(ArgumentError, match="devices lists 2"):
        PromptBank(RAGGED, devices=["cpu", "cpu"])


def test_a_backbone_without_attention_layers_has_an_empty_bank():
    bank = PromptBank((), bytes=100)
    assert bank.stats().capacity_bytes == 0
    with pytest.raises(ArgumentError, match="for layers"):
        bank.put("a", make_prefix(2), "v")


def test_duplicate_and_unknown_names():
    bank, prefixes = filled([3, 4], 10)
    before = snapshot(bank)
    with pytest.raises(DuplicatePromptError, match="use replace"):
        bank.put("0", prefixes["1"], "v2")
    for call in (bank.get, bank.remove, lambda n: bank.replace(n, prefixes["0"], "v2")):
        with pytest.raises(PromptNotFoundError, match="'nobody' is not among the bank's 2 prompts"):
            call("nobody")
    assert_unchanged(bank, before)


def test_near_names_are_suggested():
    bank = PromptBank(EQUAL)
    bank.put("sentiment", make_prefix(1), "v")
    with pytest.raises(PromptNotFoundError, match="did you mean 'sentiment'"):
        bank.get("sentimant")


def test_pinning_an_unknown_name_pins_nothing():
    bank, _ = filled([3, 4], 10)
    with pytest.raises(PromptNotFoundError), bank.pin(["0", "nobody"]):
        pytest.fail("entered")
    assert bank.stats().pinned == 0


def broken(kind):
    good = make_prefix(5, RAGGED)
    keys, values = list(good.keys), list(good.values)
    layers = good.layers
    if kind == "nan":
        values[1][0, 2, 1] = torch.nan
    elif kind == "inf":
        keys[2][0, 0, 0] = -torch.inf
    elif kind == "heads":
        keys[1] = torch.zeros(2, 5, 6)
    elif kind == "dim":
        values[2] = torch.zeros(3, 5, 2)
    elif kind == "length":
        values[0] = torch.zeros(2, 6, 4)
    elif kind == "integer":
        keys[0] = keys[0].long()
    elif kind == "rank":
        keys[0] = keys[0][0]
    elif kind == "layer":
        layers = (0, 1, 3)
    elif kind == "repeat":
        layers = (0, 1, 1)
    elif kind == "count":
        values = values[:2]
    elif kind == "none":
        layers, keys, values = (), [], []
    elif kind == "empty":
        keys, values = [t[:, :0] for t in keys], [t[:, :0] for t in values]
    return Prefix(layers, tuple(keys), tuple(values))


REFUSALS = {
    "nan": "values of layer 1 hold NaN",
    "inf": "keys of layer 2 hold NaN or infinity",
    "heads": r"keys of layer 1 are \[2, 5, 6\].*expected \[1, 5, 6\]",
    "dim": r"values of layer 2 are \[3, 5, 2\].*expected \[3, 5, 5\]",
    "length": r"values of layer 0 are \[2, 6, 4\].*expected \[2, 5, 4\]",
    "integer": "int64.*floating-point",
    "rank": r"keys of layer 0 are \[5, 4\], expected \[Hkv, P, D\]",
    "layer": r"layers \[0, 1, 3\], expected distinct ones below 3",
    "repeat": r"layers \[0, 1, 1\]",
    "count": "3 layers, 3 keys and 2 values",
    "none": "0 layers, 0 keys and 0 values",
    "empty": "at least one token",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_broken_prefix_is_refused_and_changes_nothing(kind):
    bank = PromptBank(RAGGED)
    bank.put("good", make_prefix(5, RAGGED), "v1")
    before = snapshot(bank)
    for write in (lambda p: bank.put("bad", p, "v"), lambda p: bank.replace("good", p, "v2")):
        with pytest.raises(ArgumentError, match=REFUSALS[kind]):
            write(broken(kind))
    assert_unchanged(bank, before)


def test_overflow_on_conversion_is_refused():
    prefix = make_prefix(3)
    prefix.keys[1][0, 0, 0] = 1e5
    PromptBank(EQUAL, dtype=torch.bfloat16).put("fits", prefix, "v")
    with pytest.raises(ArgumentError, match=r"infinity as torch\.float16"):
        PromptBank(EQUAL, dtype=torch.float16).put("overflows", prefix, "v")


def test_bad_dtype_and_budget():
    with pytest.raises(ArgumentError, match=r"dtype is torch.int8"):
        PromptBank(EQUAL, dtype=torch.int8)
    with pytest.raises(ArgumentError, match=f"expected at least {TOKEN_BYTES}"):
        PromptBank(EQUAL, bytes=TOKEN_BYTES - 1)


def test_a_thousand_prompts(record_property):
    bank, prefix = PromptBank(EQUAL), make_prefix(16)
    start = time.perf_counter()
    for i in range(1000):
        bank.put(f"tenant-{i}", prefix, "v")
    record_property("put_us", (time.perf_counter() - start) * 1e3)
    start = time.perf_counter()
    entries = [bank.get(f"tenant-{i}") for i in range(1000)]
    record_property("get_us", (time.perf_counter() - start) * 1e3)
    assert len({e.start for e in entries}) == 1000
    assert bank.stats().tokens == 16_000
