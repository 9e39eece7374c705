"""Tiers: what a lease reads, who leaves for whom, and what happens to versions that lost their name."""

import threading

import pytest
import torch
from residency_tools import (
    WAIT,
    backbone,
    constant,
    embedding,
    files,
    fill,
    held,
    holds,
    settle,
    spec,
    token_bytes,
)

from fastprompt import Cartridge, PTuningV2
from fastprompt.errors import ArgumentError, BankFullError
from fastprompt.integrations.transformers.backbone import evaluating
from fastprompt.prompt_format import prompt_files
from fastprompt.serving import pipeline


def test_a_prefix_lies_in_the_arena_as_it_is(registry, make):
    residency = make()
    prompt = PTuningV2(num_virtual_tokens=3, layers=(0, 2)).build(spec(), seed=1)
    registry.put("a", prompt_files(prompt))
    lease = settle(residency, "a")
    prefix = prompt()
    assert (lease.extent.layers, lease.extent.length, lease.extent.shift) == ((0, 2), 3, 3)
    want = [t for pair in zip(prefix.keys, prefix.values, strict=True) for t in pair]
    assert all(torch.equal(a, b) for a, b in zip(held(residency, lease), want, strict=True))
    assert lease.version == registry.current("a")


def test_an_embedding_prompt_is_compiled_by_itself(registry, make):
    """Bit for bit as the library compiles it, however many come at once."""
    residency = make(tokens=64)
    for i, length in enumerate([4, 9, 2, 7]):
        registry.put(f"e{i}", prompt_files(embedding(i, length)))
        assert residency.acquire(f"e{i}") is None
    for i, length in enumerate([4, 9, 2, 7]):
        lease = settle(residency, f"e{i}")
        with torch.no_grad(), evaluating(backbone().model):
            want = backbone().compile([embedding(i, length).weights()])[0]
        pairs = [t for pair in zip(want.keys, want.values, strict=True) for t in pair]
        assert all(torch.equal(a, b) for a, b in zip(held(residency, lease), pairs, strict=True))
        lease.release()


def test_reading_goes_on_beside_the_engine(registry, make, monkeypatch):
    """While one prompt is stuck in a loader, others are served, and nothing waits."""
    residency = make()
    fill(registry, 2)
    settle(residency, "p0").release()
    gate, entered = threading.Event(), threading.Event()
    real = registry.load
    monkeypatch.setattr(registry, "load", lambda v: (entered.set(), gate.wait(WAIT), real(v))[2])
    assert residency.acquire("p1") is None and entered.wait(WAIT)
    for _ in range(100):
        assert residency.acquire("p1") is None and not residency.progress()
        lease = residency.acquire("p0")
        assert holds(residency, lease, 0)
        lease.release()
    assert residency.stats().loading == 1
    gate.set()
    lease = settle(residency, "p1")
    assert holds(residency, lease, 1) and residency.stats().disk.loads == 2


def test_loaders_leave_the_number_of_threads_alone(make):
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make(loaders=2)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), seen) == (2, [2])
    finally:
        torch.set_num_threads(before)


def test_the_least_recently_used_leaves_the_device(registry, make):
    residency = make(tokens=12)
    fill(registry, 4)
    for name in ("p0", "p1", "p2"):
        settle(residency, name).release()
    residency.acquire("p0").release()
    settle(residency, "p3").release()
    device = residency.stats().device
    assert (device.prompts, device.evictions, device.promotions, device.hits, device.misses) == (3, 1, 4, 1, 4)
    assert device.bytes == device.budget == 12 * token_bytes()
    assert residency.acquire("p0") is not None and residency.acquire("p3") is not None
    lease = residency.acquire("p1")  # its copy in host memory makes it immediate
    assert lease is not None and holds(residency, lease, 1)
    host = residency.stats().host
    assert (host.prompts, host.hits, host.misses) == (4, 1, 4) and residency.stats().disk.loads == 4


def test_the_host_tier_keeps_to_its_bytes(registry, make):
    residency = make(tokens=8, host_bytes=3 * 4 * token_bytes())
    fill(registry, 6)
    for name in registry.names():
        settle(residency, name).release()
        host = residency.stats().host
        assert host.bytes == host.prompts * 4 * token_bytes() <= host.budget
    assert (host.prompts, host.evictions) == (3, 3)
    loads = residency.stats().disk.loads
    assert residency.acquire("p0") is None  # in neither tier any more
    settle(residency, "p0")
    assert residency.stats().disk.loads == loads + 1


@pytest.mark.parametrize("host_bytes", [0, 5 * 10**5])
def test_many_wait_for_a_device_of_one(registry, make, host_bytes):
    """Without host memory too, everybody gets a turn."""
    residency = make(tokens=4, host_bytes=host_bytes)
    fill(registry, 3 * pipeline.MOST)
    waiting = set(registry.names())
    ready = threading.Event()
    residency.on_ready = ready.set
    for _ in range(10_000):
        ready.clear()
        for name in sorted(waiting):
            lease = residency.acquire(name)
            if lease is not None:
                assert holds(residency, lease, int(name[1:]))
                lease.release()
                waiting.discard(name)
        assert len(residency._pipeline) <= pipeline.MOST
        if not waiting:
            break
        residency.progress() or ready.wait(WAIT)
    assert not waiting


def test_a_full_device_waits_for_a_release(registry, make):
    residency = make(tokens=8)
    fill(registry, 3)
    leases = [settle(residency, name) for name in ("p0", "p1")]
    for _ in range(20):
        assert residency.acquire("p2") is None
        residency.progress()
    leases[0].release()
    leases[0].release()  # a second time does nothing
    lease = settle(residency, "p2")
    assert holds(residency, lease, 2) and holds(residency, leases[1], 1)
    assert residency.acquire("p0") is None


def test_a_prompt_larger_than_the_device_is_refused(registry, make):
    residency = make(tokens=8)
    registry.put("large", files(1, 9))
    for _ in range(3):
        with pytest.raises(BankFullError, match="9 tokens, the device's memory for prompts 8"):
            residency.acquire("large")
    assert residency.stats().disk.loads == 0
    registry.put("large", files(2, 8))
    assert holds(residency, settle(residency, "large"), 2)


def test_an_unbounded_device_grows(registry, make):
    residency = make(tokens=None)
    fill(registry, 4, length=100)
    keys, _ = residency.arenas()
    leases = [settle(residency, name) for name in registry.names()]
    assert residency.bank.generation > 0 and residency.arenas()[0][0] is not keys[0]
    assert all(holds(residency, lease, i) for i, lease in enumerate(leases))
    assert residency.arenas()[0] is residency.arenas()[0]


def test_arenas_of_every_site(make):
    residency = make(tokens=7)
    keys, values = residency.arenas()
    assert [list(t.shape) for t in keys] == [[s.kv_heads, 7, s.key_dim] for s in spec().sites]
    assert [list(t.shape) for t in values] == [[s.kv_heads, 7, s.value_dim] for s in spec().sites]


def test_prompts_nobody_waits_for_any_more_make_room(registry, make, monkeypatch):
    """Cancelled requests must not hold up others."""
    residency = make(tokens=4)
    fill(registry, pipeline.MOST + 3)
    names = registry.names()
    for name in names[: pipeline.MOST]:
        assert residency.acquire(name) is None
    last = names[-1]
    monkeypatch.setattr(pipeline, "PATIENCE", 0.05)
    lease = None
    ready = threading.Event()
    while lease is None:
        residency.progress()
        ready.wait(0.01)
        lease = residency.acquire(last)
    assert holds(residency, lease, int(last[1:]))
    assert residency.stats().host.prompts > 1  # read in vain, so kept for later


@pytest.mark.parametrize("options", [{"storage": "int4"}, {"loaders": 0}, {"tokens": 0}])
def test_options_that_are_none(make, options):
    with pytest.raises(ArgumentError, match=r"storage is 'int4'|loaders is 0|holds no token"):
        make(**options)


def test_long_prompts_are_compiled_in_turns(registry, make, monkeypatch):
    """Rows get their turn between embedding prompts that were read together."""
    monkeypatch.setattr(pipeline, "COMPILED_TOKENS", 1)
    residency = make(tokens=64)
    for i in range(3):
        registry.put(f"e{i}", prompt_files(embedding(i)))
        assert residency.acquire(f"e{i}") is None
    rounds = 0
    leases = {}
    while len(leases) < 3:
        before = len(residency._pipeline._ready)
        residency.progress()
        assert len(residency._pipeline._ready) <= before + 1
        rounds += 1
        for i in range(3):
            lease = residency.acquire(f"e{i}") if i not in leases else None
            if lease is not None:
                leases[i] = lease
    assert rounds >= 3


def test_cartridges_of_many_tokens(registry, make):
    residency = make(tokens=700)
    prompt = Cartridge(num_virtual_tokens=600).build(spec(), seed=0)
    registry.put("a", prompt_files(prompt))
    registry.put("b", prompt_files(constant(2, 100)))
    first, second = settle(residency, "a"), settle(residency, "b")
    assert torch.equal(held(residency, first)[0], prompt().keys[0]) and holds(residency, second, 2)
