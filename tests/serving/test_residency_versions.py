"""Names that are replaced, deleted, made again: a lease reads what its name stood for; memory forgets the rest."""

import pytest
from residency_tools import (
    files,
    fill,
    holds,
    settle,
)

from fastprompt.errors import PromptNotFoundError


@pytest.mark.parametrize("told", [True, False])
def test_rows_keep_the_version_they_began_with(registry, make, told):
    residency = make(tokens=32)
    registry.put("a", files(1))
    old = settle(residency, "a")
    registry.put("a", files(2, 6))
    if told:
        residency.drop("a")
    new = settle(residency, "a")
    assert holds(residency, old, 1) and holds(residency, new, 2)
    assert (old.extent.length, new.extent.length) == (4, 6)
    registry.delete("a")
    if told:
        residency.drop("a")
    with pytest.raises(PromptNotFoundError):
        residency.acquire("a")
    registry.put("a", files(3, 2))
    again = settle(residency, "a")
    assert [holds(residency, lease, v) for lease, v in ((old, 1), (new, 2), (again, 3))] == [True] * 3
    for lease in (old, new, again):
        lease.release()
    stats = residency.stats()
    assert (stats.device.prompts, stats.host.prompts, stats.leased) == (1, 1, 0)


def test_deleted_prompts_leave_memory(registry, make):
    residency = make()
    fill(registry, 2)
    settle(residency, "p0").release()
    lease = settle(residency, "p1")
    for name in ("p0", "p1"):
        registry.delete(name)
        residency.drop(name)
    residency.progress()
    assert holds(residency, lease, 1)
    stats = residency.stats()
    assert (stats.device.prompts, stats.host.prompts, stats.leased) == (0, 0, 1)
    lease.release()
    assert residency.stats().device.bytes == 0


def test_equal_contents_are_held_once(registry, make):
    residency = make()
    for name in ("a", "b"):
        registry.put(name, files(1))
    first, second = settle(residency, "a"), settle(residency, "b")
    assert first.extent == second.extent and residency.stats().device.prompts == 1
    assert (first.version.name, second.version.name) == ("a", "b")
    registry.delete("a")
    residency.drop("a")
    first.release()
    residency.progress()
    assert residency.stats().device.prompts == 1 and residency.acquire("b") is not None


def test_replaced_back_and_forth(registry, make):
    residency = make(tokens=64)
    for value in (1, 2, 1, 1, 3, 2):
        registry.put("a", files(value))
        lease = settle(residency, "a")
        assert holds(residency, lease, value)
        lease.release()
    assert residency.stats().device.prompts == residency.stats().host.prompts == 1
