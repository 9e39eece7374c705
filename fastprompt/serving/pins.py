"""Names whose prompts an administrator keeps on the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastprompt.errors import BankFullError, FastPromptError, PromptNotFoundError
from fastprompt.serving.registry import PromptRegistry

if TYPE_CHECKING:
    from fastprompt.serving.residency import Lease

_log = logging.getLogger(__name__)
_SHARE = 0.75  # of the device's budget at most; the rest is for everybody else


@dataclass(eq=False)
class _Pin:
    """`settled` is the registry's generation as of which the lease is right; None while there is work."""

    length: int
    lease: Lease | None = None
    settled: int | None = None


class Pins:
    """Leases on the current versions of some names, renewed when a name is replaced, given up when it is deleted.

    `renew` runs in the engine's thread, all else in any. The old version goes first: there may be no room for both.
    """

    def __init__(self, registry: PromptRegistry, acquire: Callable[[str], Lease | None], capacity: int | None) -> None:
        self._registry, self._acquire, self._capacity = registry, acquire, capacity
        self._lock = threading.Lock()
        self._pins: dict[str, _Pin] = {}

    def names(self) -> dict[str, bool]:
        """The names, and whether each is on the device."""
        with self._lock:
            return {name: pin.lease is not None for name, pin in self._pins.items()}

    def starts(self) -> set[int]:
        """Where the pinned versions lie in the arena."""
        with self._lock:
            return {pin.lease.extent.start for pin in self._pins.values() if pin.lease is not None}

    @property
    def waits(self) -> bool:
        """Whether `renew` has work left."""
        with self._lock:
            return any(pin.settled != self._registry.generation for pin in self._pins.values())

    def add(self, name: str) -> None:
        """Errors: PromptNotFoundError, PromptFileError; BankFullError if pins would fill the device."""
        length = self._registry.current(name).length
        with self._lock:
            if name in self._pins:
                return
            tokens = length + sum(pin.length for pin in self._pins.values())
            if self._capacity is not None and tokens > _SHARE * self._capacity:
                raise BankFullError(
                    f"pinning {name!r} would hold {tokens} of the device's {self._capacity} tokens, at most "
                    f"{_SHARE:.0%} may be pinned: unpin others first, or give the device more bytes"
                )
            self._pins[name] = _Pin(length)

    def remove(self, name: str) -> None:
        """Errors: PromptNotFoundError for a name that is not pinned."""
        if not self._give_up(name):
            raise PromptNotFoundError(f"prompt {name!r} is not pinned")

    def renew(self) -> None:
        """Bring every pin to its name's current version, where that is possible by now."""
        generation = self._registry.generation
        with self._lock:
            waiting = [(name, pin) for name, pin in self._pins.items() if pin.settled != generation]
        for name, pin in waiting:
            try:
                self._renew(name, pin, generation)
            except PromptNotFoundError:
                self._give_up(name)
            except FastPromptError:
                pin.settled = generation  # keeps what it has, until something changes
            except Exception:  # a full device, a broken disk: no other prompt's business
                _log.exception("pinned prompt %r could not be brought to the device", name)
                pin.settled = generation

    def _give_up(self, name: str) -> bool:
        """Whether a name was pinned; it is not any more."""
        with self._lock:
            pin = self._pins.pop(name, None)
            lease = None
            if pin is not None:
                lease, pin.lease = pin.lease, None  # whoever takes it out, and nobody else, releases it
        if lease is not None:
            lease.release()
        return pin is not None

    def _renew(self, name: str, pin: _Pin, generation: int) -> None:
        version = self._registry.current(name)
        held = pin.lease
        if held is not None and held.version.version != version.version:
            with self._lock:
                old, pin.lease = pin.lease, None
            if old is not None:
                old.release()
        if pin.lease is None:
            lease = self._acquire(name)
            if lease is None:
                return
            with self._lock:
                pin.lease, pin.length = lease, lease.extent.length
                gone = self._pins.get(name) is not pin
            if gone:
                lease.release()
        pin.settled = generation
