"""Planning agrees with what is planned: banks, files, engines, and caches that are simulated."""

from __future__ import annotations

import json
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import zoo

import fastprompt as fp
from fastprompt import store
from fastprompt.bank import PromptBank
from fastprompt.capacity import Footprint, Sizes, Traffic, footprint, hits, token_bytes
from fastprompt.errors import ArgumentError
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.host_copy import HostCopy
from fastprompt.serving.runner import PackedRunner
from fastprompt.serving.scheduler import Rules

LENGTH = 7


def tensor_bytes(path) -> int:
    """Bytes of the numbers of a safetensors file, without its header."""
    raw = path.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("config", [fp.PrefixTuning, fp.PTuningV2, fp.Cartridge, fp.PromptTuning, fp.PTuning])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_of_a_decoder(config, dtype, tmp_path):
    backbone = inspect_backbone(zoo.causal("qwen2").to(dtype))
    prompt = config(num_virtual_tokens=LENGTH).build(backbone.spec)
    kind = config.kind
    want = footprint(backbone.spec, kind, LENGTH, dtype.itemsize)
    with torch.no_grad():
        made = prompt() if kind == "prefix" else backbone.compile([prompt().to(dtype)])[0]
    bank = PromptBank(backbone.spec.layers, dtype=dtype)
    bank.put("a", made, "1")
    assert bank.stats().bytes == want.device
    assert HostCopy.pack(made.map(lambda t: t.to(dtype))).nbytes == want.host
    store.save_prompt(tmp_path / "a", prompt)
    assert tensor_bytes(tmp_path / "a" / "prompt.safetensors") == want.file


def test_a_prompt_of_an_encoder(tmp_path):
    backbone = inspect_backbone(zoo.encoder("bert"))
    for config in (fp.PrefixTuning, fp.PromptTuning):
        want = footprint(backbone.spec, config.kind, LENGTH, 4)
        store.save_prompt(tmp_path / config.method, config(num_virtual_tokens=LENGTH).build(backbone.spec))
        assert tensor_bytes(tmp_path / config.method / "prompt.safetensors") == want.file == want.device


def test_own_tokens_are_those_of_the_engine(tmp_path):
    model = zoo.causal("llama")
    options = EngineOptions(Rules(max_rows=3), block_size=4, max_model_len=32)
    engine = build_engine(model, tmp_path, options)
    backbone = inspect_backbone(model)
    token = token_bytes(backbone.spec, backbone.dtype.itemsize)
    assert engine.pool.count * PackedRunner.block_bytes(backbone, 4) == 3 * 32 * token
    engine.residency.close()


def simulate(traffic: Traffic, device: int, host: int, requests: int = 120_000) -> tuple[float, float, float]:
    """Two LRU caches, the second asked for what the first misses; the first quarter does not count."""
    drawn = random.Random(7).choices(range(traffic.prompts), traffic.popularity().tolist(), k=requests)
    tiers = [(OrderedDict(), device), (OrderedDict(), host)]
    counts = [0, 0, 0]
    for i, name in enumerate(drawn):
        found = 2
        for place, (held, room) in enumerate(tiers):
            known = name in held
            held[name] = None
            held.move_to_end(name)
            if len(held) > room:
                held.popitem(last=False)
            if known:
                found = place
                break
        counts[found] += i >= requests // 4
    return tuple(count / sum(counts) for count in counts)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.1])
@pytest.mark.parametrize(("device", "host"), [(20, 0), (100, 300), (500, 900), (999, 1), (50, 1000)])
def test_hit_rates_are_those_of_a_simulated_cache(exponent, device, host):
    traffic = Traffic(1000, exponent, 10.0)
    share = hits(traffic, device, host)
    found = simulate(traffic, device, host)
    # a share of 90,000 draws has a standard deviation below 0.0017; the rest is the approximations': Che's, and that
    # host memory sees misses only, which keeps some prompts longer there and others shorter
    assert abs(share.device - found[0]) < 0.01
    assert abs(share.disk - found[2]) < 0.02


def test_hit_rates_at_the_ends():
    traffic = Traffic(50, 1.0, 1.0)
    for device, host, want in ((0, 0, (0, 0, 1)), (50, 0, (1, 0, 0)), (10**9, 5, (1, 0, 0)), (0, 50, (0, 1, 0))):
        share = hits(traffic, device, host)
        assert np.allclose((share.device, share.host, share.disk), want, atol=1e-12), (device, host)
    rising = [hits(traffic, k).device for k in range(51)]
    assert rising == sorted(rising)
    large = hits(Traffic(1_000_000, 0.9, 1.0), 1000)
    assert 0 < large.device < 1


def test_distinct_prompts_of_a_batch():
    traffic, rng = Traffic(40, 1.0, 1.0), random.Random(3)
    weights = traffic.popularity().tolist()
    drawn = [len(set(rng.choices(range(40), weights, k=16))) for _ in range(4000)]
    # the mean of 4000 counts with a standard deviation of about 1.5
    assert abs(traffic.distinct(16) - sum(drawn) / len(drawn)) < 0.1
    assert Traffic(1, 1.0, 1.0).distinct(5) == pytest.approx(1.0)


def test_what_is_refused():
    spec = inspect_backbone(zoo.causal("llama")).spec
    for kind, length in (("head", 3), ("prefix", 0)):
        with pytest.raises(ArgumentError, match="at least 1"):
            footprint(spec, kind, length, 4)
    for wrong in ((0, 1.0, 1.0), (3, -1.0, 1.0), (3, 1.0, -1.0)):
        with pytest.raises(ArgumentError):
            Traffic(*wrong)
    with pytest.raises(ArgumentError, match="give more"):
        _ = Sizes(1000, 900, 200).left
    assert Sizes(1000, 300, 200, 0.1).left == 400


def test_footprints_are_plain_values():
    spec = inspect_backbone(zoo.causal("llama")).spec
    one = footprint(spec, "prefix", 3, 2)
    assert json.loads(json.dumps(vars(one))) == vars(one) and isinstance(one, Footprint)
