"""Prompts that an administrator takes out of memory, and where a prompt is."""

import pytest
import torch
from residency_tools import backbone, files, held, settle, spec, token_bytes

from fastprompt.errors import ArgumentError
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency


@pytest.fixture
def residency(tmp_path):
    registry = PromptRegistry(tmp_path / "prompts", spec())
    for i in range(3):
        registry.put(f"p{i}", files(i, 4))
    made = Residency(backbone(), registry, device_bytes=8 * token_bytes())
    yield made
    made.close()


def tiers(residency):
    return [residency.tier(residency.registry.current(f"p{i}").version) for i in range(3)]


def test_tiers(residency):
    assert tiers(residency) == ["disk"] * 3
    for name in ("p0", "p1", "p2"):
        settle(residency, name).release()
    assert tiers(residency) == ["host", "device", "device"]


def test_an_unloaded_prompt_leaves_memory_and_comes_back(residency):
    lease = settle(residency, "p0")
    before = [t.clone() for t in held(residency, lease)]
    lease.release()
    residency.unload("p0")
    residency.progress()
    assert tiers(residency)[0] == "disk"
    again = settle(residency, "p0")
    assert all(torch.equal(a, b) for a, b in zip(before, held(residency, again), strict=True))


def test_a_row_that_reads_an_unloaded_prompt_goes_on(residency):
    lease = settle(residency, "p0")
    before = [t.clone() for t in held(residency, lease)]
    residency.unload("p0")
    residency.progress()
    settle(residency, "p1").release()
    assert all(torch.equal(a, b) for a, b in zip(before, held(residency, lease), strict=True))
    lease.release()


def test_pinned_prompts_are_not_unloaded_and_unknown_ones_are_nothing(residency):
    residency.pin("p0")
    with pytest.raises(ArgumentError, match="unpin"):
        residency.unload("p0")
    residency.unload("absent")
    residency.progress()
