"""PromptBank in random order and from several threads."""

import threading
import time
from itertools import pairwise

import pytest
import torch
from bank_tools import EQUAL, RAGGED, TOKEN_BYTES, holds, make_prefix
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fastprompt.bank import PromptBank
from fastprompt.errors import ArgumentError, BankFullError, DuplicatePromptError, PromptNotFoundError
from fastprompt.spec import Prefix

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
