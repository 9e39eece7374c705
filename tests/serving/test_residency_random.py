"""Registry and residency in random order, beside a dictionary of what they should say; and from several threads."""

import contextlib
import random
import tempfile
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from residency_tools import WAIT, backbone, files, holds, settle, spec, token_bytes

from fastprompt.errors import BankFullError, ConflictError, PromptFileError, PromptNotFoundError
from fastprompt.prompt_format import METADATA, WEIGHTS
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


class ResidencyMachine(RuleBasedStateMachine):
    """Every lease reads what its name stood for when it was given, to its end; every tier keeps to its bytes."""

    leases = Bundle("leases")
    tokens, host_tokens, storage = 14, 10, "model"

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = PromptRegistry(self.folder.name, spec())
        self.residency = Residency(
            backbone(),
            self.registry,
            device_bytes=self.tokens * token_bytes(),
            host_bytes=self.host_tokens * token_bytes(),
            storage=self.storage,
        )
        self.stored: dict[str, tuple[int, int]] = {}  # name -> value and length
        self.open: list[tuple] = []

    @rule(name=NAMES, value=st.integers(1, 6), length=st.integers(1, 6), told=st.booleans())
    def put(self, name, value, length, told):
        self.registry.put(name, files(value, length))
        self.stored[name] = value, length
        if told:
            self.residency.drop(name)

    @rule(name=NAMES, told=st.booleans())
    def delete(self, name, told):
        if name not in self.stored:
            with pytest.raises(PromptNotFoundError):
                self.registry.delete(name)
            return
        self.registry.delete(name)
        del self.stored[name]
        if told:
            self.residency.drop(name)

    @rule(target=leases, name=NAMES, patient=st.booleans())
    def acquire(self, name, patient):
        try:
            lease = self.residency.acquire(name)
            if lease is None and patient and not self.open and not self.residency.pinned():
                lease = settle(self.residency, name)  # nothing is in the way for good
        except PromptNotFoundError:
            assert name not in self.stored
            return multiple()
        except BankFullError:
            assert self.residency.pinned() and not self.open
            return multiple()
        if lease is None:
            return multiple()
        opened = lease, self.stored[name]
        self.open.append(opened)
        return opened

    @rule(opened=consumes(leases))
    def release(self, opened):
        self.open = [o for o in self.open if o is not opened]
        opened[0].release()

    @rule()
    def progress(self):
        self.residency.progress()

    @rule(name=NAMES)
    def pin(self, name):
        try:
            self.residency.pin(name)
        except PromptNotFoundError:
            assert name not in self.stored
        except BankFullError:
            assert self.residency.pinned()

    @rule(name=NAMES)
    def unpin(self, name):
        if name in self.residency.pinned():
            self.residency.unpin(name)

    @rule()
    def restart(self):
        """Another process's view of the folder."""
        assert PromptRegistry(self.folder.name, spec()).names() == sorted(self.stored)

    @invariant()
    def leases_read_what_they_began_with(self):
        for lease, (value, length) in self.open:
            assert lease.extent.length == length and holds(self.residency, lease, value)

    @invariant()
    def names_and_bytes(self):
        assert self.registry.names() == sorted(self.stored)
        stats = self.residency.stats()
        assert stats.device.bytes <= stats.device.budget and stats.host.bytes <= stats.host.budget
        assert stats.leased <= len(self.open) + len(self.residency.pinned())

    def teardown(self):
        for lease, _ in self.open:
            lease.release()
        for name in self.residency.pinned():
            self.residency.unpin(name)
        assert self.residency.stats().leased == 0
        self.residency.close()
        self.folder.cleanup()


class EightBitMachine(ResidencyMachine):
    storage, host_tokens = "int8", 0


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestEightBitMachine = EightBitMachine.TestCase
TestEightBitMachine.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)


def test_an_engine_beside_writers_and_administrators(tmp_path):
    """One thread takes leases and reads them, two store and delete, one breaks files, one pins and looks at numbers."""
    registry = PromptRegistry(tmp_path, spec())
    residency = Residency(
        backbone(), registry, device_bytes=24 * token_bytes(), host_bytes=16 * token_bytes(), loaders=2
    )
    names = [f"p{i}" for i in range(8)]
    content = {value: files(value, 2 + value % 5) for value in range(12)}
    values = {}  # version -> value
    for value in content:
        values[registry.put("probe", content[value]).version] = value
    failures: list[str] = []
    stop = threading.Event()
    served = 0

    def writer(seed):
        chance = random.Random(seed)
        while not stop.is_set():
            name = chance.choice(names)
            try:
                if chance.random() < 0.2:
                    registry.delete(name)
                else:
                    registry.put(name, content[chance.randrange(12)], if_match=chance.choice([None, None, "*"]))
                if chance.random() < 0.7:
                    residency.drop(name)
            except (PromptNotFoundError, ConflictError):
                pass
            time.sleep(0.002)

    def breaker():
        chance = random.Random(9)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                (tmp_path / chance.choice(names) / chance.choice([METADATA, WEIGHTS])).write_bytes(b"broken")
            time.sleep(0.01)

    def administrator():
        chance = random.Random(7)
        while not stop.is_set():
            with contextlib.suppress(PromptNotFoundError, PromptFileError, BankFullError):
                (residency.pin if chance.random() < 0.5 else residency.unpin)(chance.choice(names))
            stats = residency.stats()
            if stats.device.bytes > stats.device.budget or stats.host.bytes > stats.host.budget:
                failures.append(f"{stats}")
            registry.refresh()
            time.sleep(0.003)

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as error:
            failures.append(repr(error))
            raise

    threads = [
        threading.Thread(target=guarded, args=args) for args in ((writer, 1), (writer, 2), (breaker,), (administrator,))
    ]
    for thread in threads:
        thread.start()
    chance, held = random.Random(3), []
    end = time.monotonic() + 3
    try:
        while time.monotonic() < end or served <= 50:  # however little of a busy machine it gets
            try:
                lease = residency.acquire(chance.choice(names))
            except (PromptNotFoundError, PromptFileError, BankFullError):
                lease = None
            if lease is not None:
                held.append(lease)
            if len(held) > 4 or (held and chance.random() < 0.4):
                held.pop(chance.randrange(len(held))).release()
            for lease in held:
                assert holds(residency, lease, values[lease.version.version])
                served += 1
            residency.progress()
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT)
    assert not failures, failures[:3]
    for lease in held:
        lease.release()
    for name in residency.pinned():
        residency.unpin(name)
    for name in names:  # whatever is left of them, storing them again mends them
        registry.put(name, content[0])
        residency.drop(name)
    assert all(holds(residency, settle(residency, name), 0) for name in names)
    residency.close()
    stats = residency.stats()
    assert stats.device.prompts == stats.host.prompts == 1
