"""Host copies in 8 bits: bounds on the numbers, the same numbers every time, and what they do to logits."""

import json

import pytest
import torch
from residency_tools import backbone, embedding, held, settle, spec, token_bytes

from bench import bank_storage, schema
from bench.__main__ import main
from fastprompt import PrefixTuning, PromptedModel, demo
from fastprompt.errors import ArgumentError
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.host_copy import HostCopy
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency
from fastprompt.spec import LayerShape, Prefix

SHAPES = (LayerShape(3, 5, 7), LayerShape(1, 16, 4), LayerShape(2, 8, 8))
CPU = [torch.device("cpu")] * 3


def uneven(length=11, dtype=torch.float32):
    """A prefix whose heads differ in size by six orders of magnitude, keys and values too."""
    sizes = iter(10.0 ** torch.arange(-3, 4).repeat(9))

    def tensor(heads, dim):
        scale = torch.stack([next(sizes) for _ in range(heads)])
        return (torch.randn(heads, length, dim) * scale[:, None, None]).to(dtype)

    keys, values = (
        tuple(tensor(s.kv_heads, d(s)) for s in SHAPES) for d in (lambda s: s.key_dim, lambda s: s.value_dim)
    )
    return Prefix((0, 1, 2), keys, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("storage", "steps"), [("int8", 127), ("fp8", None)])
def test_every_number_is_the_nearest_code(storage, steps, dtype):
    """int8: half a step of the head's scale. fp8 (e4m3): half a unit of 3 mantissa bits, 2^-4 of the number, or half
    the smallest step, 2^-10 of the scale. The dtype's own rounding comes on top."""
    prefix = uneven(dtype=dtype)
    back = HostCopy.pack(prefix, storage).prefix(CPU)
    for tensor, got in zip((*prefix.keys, *prefix.values), (*back.keys, *back.values), strict=True):
        assert got.dtype == dtype
        number, top = tensor.double(), tensor.double().abs().amax(dim=(1, 2), keepdim=True)
        own = torch.finfo(dtype).eps * number.abs() + torch.finfo(dtype).smallest_normal
        bound = top / steps / 2 if steps else torch.maximum(number.abs() / 16, top / 448 / 2**10)
        assert ((got.double() - number).abs() <= bound * (1 + 1e-5) + own).all()


@pytest.mark.parametrize("storage", ["model", "int8", "fp8"])
def test_size_and_zeros(storage):
    prefix = uneven().map(torch.zeros_like)
    copy = HostCopy.pack(prefix, storage)
    assert all(not t.any() for t in (*copy.prefix(CPU).keys, *copy.prefix(CPU).values))
    numbers = sum(t.numel() for t in (*prefix.keys, *prefix.values))
    heads = 2 * sum(s.kv_heads for s in SHAPES)
    assert copy.nbytes == (4 * numbers if storage == "model" else numbers + 4 * heads)
    if storage == "model":
        assert all(map(torch.equal, copy.prefix(CPU).keys, uneven().map(torch.zeros_like).keys))


def test_unknown_storage():
    with pytest.raises(ArgumentError, match="storage is 'int4', expected one of model, int8, fp8"):
        HostCopy.pack(uneven(), "int4")


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_the_device_gets_the_same_numbers_from_every_tier(tmp_path, storage):
    registry = PromptRegistry(tmp_path, spec())
    registry.put("a", prompt_files(embedding(1, 5)))
    registry.put("b", prompt_files(PrefixTuning(num_virtual_tokens=5).build(spec(), seed=0)))
    seen = {}
    for host_bytes in (0, 10**6):
        residency = Residency(
            backbone(), registry, device_bytes=5 * token_bytes(), host_bytes=host_bytes, storage=storage
        )
        for name in ("a", "b", "a", "b"):
            lease = settle(residency, name)
            got = [t.clone() for t in held(residency, lease)]
            assert all(map(torch.equal, seen.setdefault(name, got), got))
            lease.release()
        assert residency.stats().disk.loads == (4 if host_bytes == 0 else 2)
        residency.close()


LOGITS = {"int8": (0.01, 0.99), "fp8": (0.04, 0.97)}  # relative error at most, agreement of the first choice at least


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_logits_under_rounded_prompts(storage):
    model = PromptedModel(demo.backbone())
    found = bank_storage.change(model, bank_storage.instructions(model), storage, [bank_storage.random_texts(model)])
    most, least = LOGITS[storage]
    assert 0 < found.error <= most and found.same >= least, found


def test_logits_under_prompts_that_round_to_themselves_stay_as_they_are():
    model = PromptedModel(demo.backbone())
    (prefix, *_) = bank_storage.normal(model, 1)
    whole = prefix.map(lambda t: t.clamp(-1, 1).mul(126).round().index_fill(1, torch.tensor([0]), 127.0))
    found = bank_storage.change(model, [whole], "int8", [bank_storage.random_texts(model)[:2]])
    assert found.error < 1e-6 and found.same == 1.0 and found.places == 48


def test_the_benchmark_writes_a_line_for_each_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bank_storage, "_INPUTS", 1)
    out = tmp_path / "lines.jsonl"
    assert main(["bank-storage", "--out", str(out)]) == 0
    every = [json.loads(line) for line in out.read_text().splitlines()]
    assert schema.problems(every) == [] and every[0]["benchmark"] == "bank-storage"
    lines = [line for line in every if line["kind"] == "rounding"]
    assert len(lines) == 6 == len({(x["prompts"], x["storage"]) for x in lines})
    assert "of the spread" in capsys.readouterr().out
