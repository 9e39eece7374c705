"""PromptBank: growth, budget, eviction, sliding, versions, pins and autograd."""

import pytest
import torch
from bank_tools import EQUAL, TOKEN_BYTES, assert_unchanged, filled, holds, make_prefix, snapshot

from fastprompt.bank import PromptBank
from fastprompt.errors import BankFullError, PromptNotFoundError
from fastprompt.spec import Prefix


def test_an_unbounded_bank_grows_and_old_views_keep_their_data():
    bank = PromptBank(EQUAL)
    assert (bank.stats().capacity, bank.generation) == (0, 0)
    first = make_prefix(200, seed=1)
    entry = bank.put("first", first, "v")
    keys, generation = bank.keys(0), bank.generation
    bank.put("second", make_prefix(300, seed=2), "v")
    assert bank.generation == generation + 1
    assert bank.keys(0).data_ptr() != keys.data_ptr()
    assert bank.get("first") == entry
    assert holds(bank, entry, first)
    bank.replace("first", make_prefix(200, seed=3), "v2")
    assert torch.equal(keys[:, entry.start : entry.start + 200], first.keys[0])


def test_growth_is_geometric():
    bank = PromptBank(EQUAL)
    for i in range(1000):
        bank.put(str(i), make_prefix(17), "v")
    assert bank.generation <= 8
    assert bank.stats().tokens == 17_000 <= bank.stats().capacity < 40_000
    assert bank.stats().evictions == 0


def test_a_budget_is_allocated_once_and_never_exceeded():
    bank = PromptBank(EQUAL, bytes=10 * TOKEN_BYTES + 5)
    stats = bank.stats()
    assert (stats.capacity, stats.capacity_bytes, stats.budget) == (10, 10 * TOKEN_BYTES, 10 * TOKEN_BYTES + 5)
    pointer = bank.keys(0).data_ptr()
    for i in range(20):
        bank.put(str(i), make_prefix(3, seed=i), "v")
    assert bank.keys(0).data_ptr() == pointer
    assert bank.generation == 0
    assert bank.names() == ("17", "18", "19")


def test_the_least_recently_used_prompt_leaves_first():
    bank, prefixes = filled([3, 3, 3], 9)
    bank.get("0")
    with bank.pin(["1"]):
        pass
    bank.put("new", make_prefix(2, seed=9), "v")
    assert bank.names() == ("0", "1", "new")
    assert bank.stats().evictions == 1
    assert all(holds(bank, bank.get(n), prefixes[n]) for n in ("0", "1"))


def test_pinned_prompts_are_not_evicted():
    bank, prefixes = filled([3, 3, 3], 9)
    with bank.pin(["0", "1"]) as entries:
        bank.put("new", make_prefix(3, seed=9), "v")
        assert bank.names() == ("0", "1", "new")
        assert all(holds(bank, e, prefixes[e.name]) for e in entries)


def test_only_victims_that_make_room_leave():
    bank, _ = filled([2, 1, 3, 1, 4], 11)  # "0" is oldest, alone in its room; room for 4 opens only behind "3"
    with bank.pin(["1", "3"]):
        bank.put("new", make_prefix(4, seed=9), "v")
        assert set(bank.names()) == {"0", "1", "2", "3", "new"}


def test_fragments_are_slid_together():
    bank, prefixes = filled([2, 3, 2, 3], 10)
    bank.remove("0")
    bank.remove("2")
    assert bank.stats().largest_free == 2
    new = make_prefix(4, seed=9)
    entry = bank.put("new", new, "v")
    assert (bank.stats().compactions, bank.stats().evictions) == (1, 0)
    assert holds(bank, entry, new)
    assert all(holds(bank, bank.get(n), prefixes[n]) for n in ("1", "3"))


def test_sliding_stops_as_soon_as_there_is_room():
    bank, _ = filled([1, 3, 1, 3, 1, 1], 10)
    for name in ("0", "2", "4"):
        bank.remove(name)
    bank.put("new", make_prefix(2, seed=9), "v")
    assert [bank.get(n).start for n in ("1", "new", "3", "5")] == [0, 3, 5, 9]


def test_sliding_leaves_pinned_prompts_where_they_are():
    bank, prefixes = filled([1, 2, 1, 1, 2, 3], 10)  # holes at 0, 3 and 7; "3" at 4, "4" at 5
    for name in ("0", "2", "5"):
        bank.remove(name)
    with bank.pin(["3"]) as (pinned,):
        bank.put("tail", make_prefix(3, seed=10), "v")
        assert bank.stats().compactions == 0
        new = make_prefix(2, seed=11)
        assert holds(bank, bank.put("slid", new, "v"), new)
        assert (bank.stats().compactions, bank.stats().evictions) == (1, 0)
        assert bank.get("1").start == 0
        assert pinned.start == 4
        assert holds(bank, pinned, prefixes["3"])
        assert holds(bank, bank.get("1"), prefixes["1"])


def test_a_full_bank_says_so_and_stays_as_it_is():
    bank, prefixes = filled([3, 3, 3], 10)
    with bank.pin(["1"]):
        before = snapshot(bank)
        with pytest.raises(BankFullError, match=rf"needs {5 * TOKEN_BYTES} bytes .*at most {4 * TOKEN_BYTES} of"):
            bank.put("new", make_prefix(5), "v")
        with pytest.raises(BankFullError):
            bank.replace("1", make_prefix(5), "v2")
        assert_unchanged(bank, before)
    with pytest.raises(BankFullError):
        bank.put("huge", make_prefix(11), "v")
    assert bank.names() == ("0", "2", "1")
    assert all(holds(bank, bank.get(n), p) for n, p in prefixes.items())


def test_a_view_of_the_bank_can_be_put_under_another_name():
    bank, prefixes = filled([1, 3, 2], 8)
    bank.remove("0")
    entry = bank.get("1")  # slides down to make room for its own copy
    span = slice(entry.start, entry.start + entry.length)
    keys, values = zip(*((bank.keys(i)[:, span], bank.values(i)[:, span]) for i in range(3)), strict=True)
    views = Prefix((0, 1, 2), keys, values)
    bank.put("copy", views, "v")
    assert bank.stats().compactions == 1
    assert holds(bank, bank.get("copy"), prefixes["1"])
    assert holds(bank, bank.get("1"), prefixes["1"])


def test_replace_points_the_name_at_the_new_version():
    bank, _ = filled([3, 3], 10)
    new = make_prefix(4, seed=9)
    assert holds(bank, bank.replace("0", new, "v2"), new)
    assert (bank.get("0").version, len(bank), bank.stats().tokens) == ("v2", 2, 7)


def test_replace_may_use_the_old_versions_tokens():
    bank, prefixes = filled([4, 3, 3], 10)
    new = make_prefix(4, seed=9)
    assert holds(bank, bank.replace("0", new, "v2"), new)
    assert bank.stats().evictions == 0
    assert all(holds(bank, bank.get(n), prefixes[n]) for n in ("1", "2"))
    bigger = make_prefix(6, seed=10)
    assert holds(bank, bank.replace("0", bigger, "v3"), bigger)
    assert bank.names() == ("2", "0")


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_pinned_old_version_stays_until_its_last_pin(change):
    bank, prefixes = filled([3, 3], 10)
    new = make_prefix(4, seed=9)
    outer, inner = bank.pin(["0"]), bank.pin(["0", "0"])
    (old,) = outer.__enter__()
    inner.__enter__()
    if change == "replace":
        assert holds(bank, bank.replace("0", new, "v2"), new)
        assert bank.get("0").version == "v2"
    else:
        bank.remove("0")
        assert "0" not in bank
    used = bank.stats().tokens
    assert (bank.stats().retired, bank.stats().pinned) == (1, 1)
    inner.__exit__(None, None, None)
    assert holds(bank, old, prefixes["0"])
    with pytest.raises(BankFullError):
        bank.put("large", make_prefix(10), "v")
    outer.__exit__(None, None, None)
    assert (bank.stats().retired, bank.stats().pinned, bank.stats().tokens) == (0, 0, used - 3)
    bank.put("large", make_prefix(10), "v")
    assert bank.names() == ("large",)


def test_pins_are_released_when_the_reader_raises():
    bank, _ = filled([3], 10)
    with pytest.raises(RuntimeError, match="reader"), bank.pin(["0"]):
        raise RuntimeError("reader")
    assert bank.stats().pinned == 0


def test_stats_count_what_happened():
    bank, _ = filled([3, 3], 6)
    bank.get("0")
    with pytest.raises(PromptNotFoundError):
        bank.get("x")
    with bank.pin(["0", "0", "1"]):
        stats = bank.stats()
    assert (stats.prompts, stats.pinned, stats.retired, stats.hits, stats.misses) == (2, 2, 0, 4, 1)
    assert (stats.tokens, stats.bytes, stats.capacity_bytes) == (6, 6 * TOKEN_BYTES, 6 * TOKEN_BYTES)
    assert stats.largest_free == 0


def test_writes_do_not_disturb_a_graph_that_saved_another_prompt():
    bank, _ = filled([3], 10)
    query = torch.randn(4, requires_grad=True)
    with bank.pin(["0"]) as (entry,):
        keys = bank.keys(0)[:, entry.start : entry.start + 3]
        (want,) = torch.autograd.grad((keys * query).sum(), query)
        loss = (keys * query).sum()
        bank.put("other", make_prefix(4, seed=5), "v")
        (got,) = torch.autograd.grad(loss, query)
    assert torch.equal(got, want)


def test_inference_mode_and_normal_mode_mix():
    with torch.inference_mode():
        bank = PromptBank(EQUAL)
        inside = make_prefix(5, seed=1)
        bank.put("inside", inside, "v")
    outside = make_prefix(500, seed=2)
    bank.put("outside", outside, "v")
    with torch.inference_mode():
        bank.replace("inside", outside, "v2")
        bank.remove("outside")
    assert holds(bank, bank.get("inside"), outside)
    assert not bank.keys(0).is_inference()
