"""Host copies in 8 bits: bounds on the numbers, the same numbers every time, and what they do to logits."""

import pytest
import torch
from residency_tools import backbone, embedding, held, settle, spec, token_bytes

from fastprompt import Cartridge, PrefixTuning, PromptedModel, demo
from fastprompt.errors import ArgumentError
from fastprompt.integrations.transformers.backbone import evaluating
from fastprompt.prompt_format import prompt_files
from fastprompt.serving.host_copy import HostCopy
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency
from fastprompt.spec import LayerShape, Prefix, flatten

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


@pytest.fixture(scope="module")
def demo_model():
    return PromptedModel(demo.backbone())


def logits_error(model, prefixes, storage, ids):
    """RMS of the change of the logits over RMS of their spread, and how often the first choice is the same."""
    info, errors, spread, same = model._info, [], [], []
    config = Cartridge(num_virtual_tokens=prefixes[0].length)
    for name in ("exact", "rounded"):
        if name in model.library:
            model.remove_prompt(name)
    for prefix in prefixes:
        rounded = HostCopy.pack(prefix, storage).prefix(info.layer_devices)
        for name, each in (("exact", prefix), ("rounded", rounded)):
            model.library.add(name, config.restore(info.spec, flatten(each)))
        with torch.no_grad():
            a, b = (model(input_ids=ids, prompts=[name] * len(ids)).logits.double() for name in ("exact", "rounded"))
        errors.append((a - b).square().mean())
        spread.append((a - a.mean(-1, keepdim=True)).square().mean())
        same.append((a.argmax(-1) == b.argmax(-1)).double().mean())
        for name in ("exact", "rounded"):
            model.remove_prompt(name)
    ratio = (torch.stack(errors).mean() / torch.stack(spread).mean()).sqrt().item()
    return ratio, torch.stack(same).mean().item()


def demo_prefixes(model):
    """Instructions of the demo's tasks, compiled: keys and values as trained prompts have them."""
    tokenizer = demo.tokenizer()
    made = []
    for task in demo.tasks():
        ids = torch.tensor(tokenizer(task.hand_written)["input_ids"])
        rows = model._info.model.get_input_embeddings().weight.detach()[ids.repeat(16)[:16]]
        with torch.no_grad(), evaluating(model._info.model):
            made.append(model._info.compile([rows])[0])
    return made


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_logits_under_rounded_prompts(demo_model, storage, record_property):
    ids = torch.randint(5, demo_model._info.spec.vocab_size, (8, 24))
    ratio, same = logits_error(demo_model, demo_prefixes(demo_model), storage, ids)
    record_property("relative logits error", ratio)
    record_property("same first choice", same)
    most, least = LOGITS[storage]
    assert 0 < ratio <= most and same >= least, (ratio, same)
