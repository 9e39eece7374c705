"""Prompts that an administrator keeps on the device."""

import pytest
from residency_tools import files, fill, holds, settle

from fastprompt.errors import BankFullError, PromptNotFoundError


def test_pins_stay_and_follow_their_name(registry, make):
    residency = make(tokens=16)
    fill(registry, 5)
    residency.pin("p0")
    residency.pin("p0")
    assert residency.pinned() == {"p0": False}
    while not residency.pinned()["p0"]:
        residency.progress()
    for _ in range(3):
        for name in ("p1", "p2", "p3", "p4"):
            settle(residency, name).release()
    lease = residency.acquire("p0")
    assert lease is not None and residency.stats().pinned == 1
    registry.put("p0", files(7, 6))
    residency.drop("p0")
    assert residency.pinned() == {"p0": True}  # the old one, until the new one is there
    new = settle(residency, "p0")
    residency.progress()
    assert holds(residency, lease, 0) and holds(residency, new, 7)
    lease.release()
    new.release()
    for name in ("p1", "p2", "p3", "p4"):
        settle(residency, name).release()
    assert holds(residency, residency.acquire("p0"), 7)
    residency.unpin("p0")
    assert residency.pinned() == {}
    with pytest.raises(PromptNotFoundError, match="not pinned"):
        residency.unpin("p0")


def test_a_pinned_prompt_is_replaced_where_there_is_no_room_for_both(registry, make):
    residency = make(tokens=16)
    registry.put("p0", files(1, 10))
    residency.pin("p0")
    while not residency.pinned()["p0"]:
        residency.progress()
    registry.put("p0", files(2, 10))
    residency.drop("p0")
    assert holds(residency, settle(residency, "p0"), 2)
    while not residency.pinned()["p0"]:
        residency.progress()


def test_a_deleted_prompt_is_not_pinned_any_more(registry, make):
    residency = make()
    fill(registry, 2)
    residency.pin("p0")
    while not residency.pinned()["p0"]:
        residency.progress()
    registry.delete("p0")
    residency.drop("p0")
    residency.progress()
    assert residency.pinned() == {} and residency.stats().leased == 0 and residency.stats().device.prompts == 0
    registry.put("p0", files(5))
    residency.progress()
    assert residency.pinned() == {}


def test_pins_leave_room_for_others(registry, make):
    residency = make(tokens=16)
    fill(registry, 4)
    for name in ("p0", "p1", "p2"):
        residency.pin(name)
    with pytest.raises(BankFullError, match="16 of the device's 16 tokens, at most 75%"):
        residency.pin("p3")
    with pytest.raises(PromptNotFoundError):
        residency.pin("nobody")
    while not all(residency.pinned().values()):
        residency.progress()
    assert holds(residency, settle(residency, "p3"), 3)


def test_a_prompt_that_pins_leave_no_room_for_is_refused(registry, make):
    residency = make(tokens=16)
    fill(registry, 3)
    registry.put("large", files(9, 5))
    for name in ("p0", "p1", "p2"):
        residency.pin(name)
    while not all(residency.pinned().values()):
        residency.progress()
    with pytest.raises(BankFullError, match="'large' does not fit beside the pinned ones"):
        settle(residency, "large")
    residency.unpin("p2")
    assert holds(residency, settle(residency, "large"), 9)


def test_a_pin_that_breaks_breaks_alone(registry, make, monkeypatch, caplog):
    """Whatever a copy to the device raises: other pins come, rows of other prompts go on, and it is tried again."""
    residency = make(tokens=64)
    fill(registry, 3)
    put, broken = residency.bank.put, registry.current("p0").version

    def fails(name, *args):
        if name == broken:
            raise RuntimeError("out of memory")
        return put(name, *args)

    monkeypatch.setattr(residency.bank, "put", fails)
    residency.pin("p0")
    residency.pin("p1")
    lease = settle(residency, "p2")
    while not residency.pinned()["p1"]:
        residency.progress()
    assert holds(residency, lease, 2) and residency.pinned() == {"p0": False, "p1": True}
    assert "p0" in caplog.text
    monkeypatch.undo()
    registry.put("p2", files(9))  # something changed
    residency.drop("p2")
    while not residency.pinned()["p0"]:
        residency.progress()


def test_a_dropped_name_that_cannot_be_looked_up_hurts_nobody(registry, make, monkeypatch):
    residency = make()
    fill(registry, 2)
    settle(residency, "p0").release()
    current = registry.current

    def fails(name):
        if name == "p0":
            raise OSError("input/output error")
        return current(name)

    monkeypatch.setattr(registry, "current", fails)
    residency.drop("p0")
    assert holds(residency, settle(residency, "p1"), 1)
    assert residency.stats().device.prompts == 1  # what p0 stood for is not trusted any more
