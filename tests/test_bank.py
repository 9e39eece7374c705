"""PromptBank: names, versions, pins, room-making, budget, atomicity, threads."""

import threading
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fastprompt.bank import Entry, PromptBank
from fastprompt.errors import ArgumentError, BankFullError, DuplicatePromptError, PromptNotFoundError
from fastprompt.spec import LayerShape, Prefix

EQUAL = (LayerShape(2, 4, 4),) * 3
RAGGED = (LayerShape(2, 4, 4), LayerShape(1, 6, 2), LayerShape(3, 2, 5))
TOKEN_BYTES = sum(s.width for s in EQUAL) * 4


def make_prefix(length, shapes=EQUAL, layers=None, seed=0, dtype=torch.float32):
    layers = tuple(range(len(shapes))) if layers is None else layers
    rng = torch.Generator().manual_seed(seed)

    def tensor(heads, dim):
        return torch.randn(heads, length, dim, generator=rng).to(dtype)

    keys = tuple(tensor(shapes[i].kv_heads, shapes[i].key_dim) for i in layers)
    values = tuple(tensor(shapes[i].kv_heads, shapes[i].value_dim) for i in layers)
    return Prefix(layers, keys, values)


def holds(bank: PromptBank, entry: Entry, prefix: Prefix) -> bool:
    """Whether the arena has the prefix, bit for bit, where the entry says."""
    span = slice(entry.start, entry.start + entry.length)
    return (entry.length, entry.layers) == (prefix.length, prefix.layers) and all(
        torch.equal(arena(layer)[:, span], tensor.to(arena(layer).dtype))
        for arena, tensors in ((bank.keys, prefix.keys), (bank.values, prefix.values))
        for layer, tensor in zip(prefix.layers, tensors, strict=True)
    )


def filled(lengths, tokens):
    """A bank of exactly `tokens` tokens with prompts "0", "1", ... of the lengths given, and their prefixes."""
    bank = PromptBank(EQUAL, bytes=tokens * TOKEN_BYTES)
    prefixes = {str(i): make_prefix(n, seed=i) for i, n in enumerate(lengths)}
    for name, prefix in prefixes.items():
        bank.put(name, prefix, "v1")
    return bank, prefixes


def snapshot(bank):
    """Everything a failed call must leave as it was."""
    with bank.pin(bank.names()) as entries:
        data = [bank.keys(0)[:, e.start : e.start + e.length].clone() for e in entries]
    return bank.stats(), bank.names(), entries, data


def assert_unchanged(bank, before):
    stats, names, entries, data = snapshot(bank)
    assert (names, entries) == before[1:3]
    assert all(torch.equal(a, b) for a, b in zip(data, before[3], strict=True))
    counters = ("prompts", "tokens", "capacity", "largest_free", "evictions", "compactions", "generation", "retired")
    assert all(getattr(stats, c) == getattr(before[0], c) for c in counters)


# Layout


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


# Names


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


# Refusals


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


# Room


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
    bank, prefixes = filled([2, 3, 2], 10)
    bank.remove("0")
    entry = bank.get("1")  # will slide down to make room
    span = slice(entry.start, entry.start + entry.length)
    keys, values = zip(*((bank.keys(i)[:, span], bank.values(i)[:, span]) for i in range(3)), strict=True)
    views = Prefix((0, 1, 2), keys, values)
    bank.put("tail", make_prefix(1, seed=5), "v")
    bank.put("copy", views, "v")
    assert holds(bank, bank.get("copy"), prefixes["1"])
    assert holds(bank, bank.get("1"), prefixes["1"])


# Versions


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


# Autograd and inference mode


def test_writes_do_not_disturb_a_graph_that_saved_another_prompt():
    bank, _ = filled([3], 10)
    query = torch.randn(4, requires_grad=True)
    with bank.pin(["0"]) as (entry,):
        keys = bank.keys(0)[:, entry.start : entry.start + 3]
        (want,) = torch.autograd.grad((keys @ query).sum(), query)
        loss = (keys @ query).sum()
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


# Random order


LENGTHS = st.integers(1, 7)
NAMES = st.sampled_from([f"p{i}" for i in range(8)])
LAYERS = st.sampled_from([(0, 1, 2), (1,), (2, 0)])


class BankMachine(RuleBasedStateMachine):
    """The bank beside a dict of what it should hold; evicted names are those it may have dropped."""

    budget_tokens: int | None = 24
    pins = Bundle("pins")

    def __init__(self):
        super().__init__()
        self.token_bytes = sum(s.width for s in RAGGED) * 4
        budget = None if self.budget_tokens is None else self.budget_tokens * self.token_bytes + 3
        self.bank = PromptBank(RAGGED, bytes=budget)
        self.held: dict[str, Prefix] = {}
        self.open: list[tuple] = []
        self.seed = 0

    def fresh(self, length, layers):
        self.seed += 1
        return make_prefix(length, RAGGED, layers, self.seed)

    def drop_evicted(self, keep=None):
        """Forget what the bank evicted; it may evict only unpinned prompts, and only with a budget."""
        gone = set(self.held) - set(self.bank.names())
        assert keep not in gone
        assert not gone or self.budget_tokens is not None
        current = {id(self.held[e.name]) for e, p in self.pinned() if self.held.get(e.name) is p}
        assert not any(id(self.held[name]) in current for name in gone)
        for name in gone:
            del self.held[name]

    def pinned(self):
        return [(e, p) for _, pairs in self.open for e, p in pairs]

    def write(self, act, name, length, layers):
        prefix = self.fresh(length, layers)
        before = (self.bank.names(), self.bank.stats())
        try:
            entry = act(name, prefix, str(self.seed))
        except BankFullError:
            assert self.budget_tokens is not None
            walls = sorted({(e.start, e.start + e.length) for e, _ in self.pinned()})
            gaps = zip(
                [0, *(end for _, end in walls)], [*(start for start, _ in walls), self.budget_tokens], strict=True
            )
            assert max(high - low for low, high in gaps) < length
            assert before == (self.bank.names(), self.bank.stats())
            return
        self.held[name] = prefix
        self.drop_evicted(keep=name)
        assert entry == self.bank.get(name)

    @rule(name=NAMES, length=LENGTHS, layers=LAYERS)
    def put(self, name, length, layers):
        if name in self.held:
            with pytest.raises(DuplicatePromptError):
                self.bank.put(name, self.fresh(length, layers), "dup")
        else:
            self.write(self.bank.put, name, length, layers)

    @rule(name=NAMES, length=LENGTHS, layers=LAYERS)
    def replace(self, name, length, layers):
        if name in self.held:
            self.write(self.bank.replace, name, length, layers)
        else:
            with pytest.raises(PromptNotFoundError):
                self.bank.replace(name, self.fresh(length, layers), "none")

    @rule(name=NAMES)
    def remove(self, name):
        if self.held.pop(name, None) is not None:
            self.bank.remove(name)
        else:
            with pytest.raises(PromptNotFoundError):
                self.bank.remove(name)

    @rule(name=NAMES)
    def get(self, name):
        if name in self.held:
            assert self.bank.get(name).name == self.bank.names()[-1] == name

    @rule(name=NAMES)
    def put_nan(self, name):
        prefix = self.fresh(2, (0,))
        prefix.keys[0][0, 0, 0] = torch.nan
        with pytest.raises(ArgumentError):
            (self.bank.replace if name in self.held else self.bank.put)(name, prefix, "nan")

    @rule(target=pins, names=st.lists(NAMES, max_size=3))
    def pin(self, names):
        names = [n for n in names if n in self.held]
        if not names:
            return multiple()
        context = self.bank.pin(names)
        opened = (context, [(e, self.held[e.name]) for e in context.__enter__()])
        self.open.append(opened)
        return opened

    @rule(opened=consumes(pins))
    def unpin(self, opened):
        self.open = [o for o in self.open if o is not opened]
        opened[0].__exit__(None, None, None)

    @invariant()
    def every_version_is_intact(self):
        assert set(self.bank.names()) == set(self.held)
        assert len(self.bank) == len(self.held)
        with self.bank.pin(self.bank.names()) as entries:
            assert all(holds(self.bank, e, self.held[e.name]) for e in entries)
        assert all(holds(self.bank, e, p) for e, p in self.pinned())

    @invariant()
    def no_extents_overlap_and_stats_add_up(self):
        with self.bank.pin(self.bank.names()) as entries:
            extents = {(e.start, e.length) for e in entries} | {(e.start, e.length) for e, _ in self.pinned()}
        ordered = sorted(extents)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(ordered))
        stats = self.bank.stats()
        assert stats.tokens == sum(n for _, n in extents)
        assert stats.prompts == len(self.held)
        assert stats.pinned == len({e.start for e, _ in self.pinned()})
        assert stats.retired == len({e.start for e, p in self.pinned() if self.held.get(e.name) is not p})
        assert not ordered or sum(ordered[-1]) <= stats.capacity
        if self.budget_tokens is not None:
            assert stats.capacity_bytes <= stats.budget
            assert sum(self.bank.keys(i).nbytes + self.bank.values(i).nbytes for i in range(3)) == stats.capacity_bytes

    def teardown(self):
        for context, _ in self.open:
            context.__exit__(None, None, None)
        stats = self.bank.stats()
        assert (stats.pinned, stats.retired) == (0, 0)


class UnboundedMachine(BankMachine):
    budget_tokens = None


TestBudgetMachine = BankMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestUnboundedMachine = UnboundedMachine.TestCase
TestUnboundedMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


# Threads


@pytest.mark.parametrize("tokens", [40, None])
def test_readers_see_whole_versions_while_writers_replace(tokens):
    """Every prefix is one number throughout, so a mixture of versions or prompts shows at once."""
    names = [f"p{i}" for i in range(6)]
    bank = PromptBank(EQUAL, bytes=None if tokens is None else tokens * TOKEN_BYTES)
    failures: list[str] = []
    reads = [0]
    stop = threading.Event()

    def constant(value, length):
        return make_prefix(length).map(lambda t: torch.full_like(t, float(value)))

    def write(worker):
        rng = torch.Generator().manual_seed(worker)
        for step in range(400):
            which, length = torch.randint(0, 5, (2,), generator=rng).tolist()
            name, value = names[which + worker % 2], worker * 1000 + step
            try:
                if name in bank:
                    bank.replace(name, constant(value, length + 1), str(value))
                else:
                    bank.put(name, constant(value, length + 1), str(value))
                if step % 13 == 0:
                    bank.remove(name)
            except (PromptNotFoundError, DuplicatePromptError, BankFullError):
                pass  # another writer came first, or readers pin too much

    def read(worker):
        while not stop.is_set():
            try:
                with bank.pin([names[worker], names[worker + 2]]) as entries:
                    for _ in range(3):
                        for e in entries:
                            span = slice(e.start, e.start + e.length)
                            seen = [t[:, span] for i in e.layers for t in (bank.keys(i), bank.values(i))]
                            if not all((t == float(e.version)).all() for t in seen):
                                failures.append(f"{e} holds {[t.unique().tolist() for t in seen]}")
                    reads[0] += 1
            except PromptNotFoundError:
                time.sleep(0)

    def guarded(function, worker):
        try:
            function(worker)
        except BaseException as error:
            failures.append(repr(error))

    writers = [threading.Thread(target=guarded, args=(write, i)) for i in range(3)]
    readers = [threading.Thread(target=guarded, args=(read, i)) for i in range(3)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures, failures[:3]
    assert reads[0] > 0
    assert (bank.stats().pinned, bank.stats().retired) == (0, 0)


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
