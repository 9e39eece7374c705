"""Memory of the machine: bytes at addresses, which of them exist, and which of them may be written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # np.ndarray

READ, WRITE = 1, 2
_APART = 512  # bytes between allocations, which nothing may touch
SHARED_BASE = 1024  # where a block's shared memory begins


class PtxError(Exception):
    """What a real machine would fail at, or do in no defined way."""


class Space:
    """`size` bytes from address `base` on; those that are open are NaN in all number formats until written."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.size = base, size
        room = -(-size // 16) * 16
        self.bytes: Array = np.empty(room, np.uint8)
        self.rights: Array = np.zeros(room, np.uint8)

    def open(self, at: int, size: int, rights: int) -> Array:
        """So many bytes from an offset on, which may be used from now."""
        self.rights[at : at + size] = rights
        self.bytes[at : at + size] = 0xFF
        return self.bytes[at : at + size]

    def load(self, address: Array, dtype: Any, count: int, mask: Array) -> list[Array]:
        """`count` consecutive numbers a lane, from aligned addresses; zeros in lanes that are not in the mask."""
        at = self._index(address, np.dtype(dtype).itemsize, count, mask, READ)
        words = self.bytes.view(dtype)
        return [words[at + i] for i in range(count)]

    def store(self, address: Array, values: list[Array], mask: Array) -> None:
        at = self._index(address, values[0].dtype.itemsize, len(values), mask, WRITE)[mask]
        words = self.bytes.view(values[0].dtype)
        for i, value in enumerate(values):
            words[at + i] = np.broadcast_to(value, mask.shape)[mask]

    def _index(self, address: Array, width: int, count: int, mask: Array, right: int) -> Array:
        """Where a lane's first number is, in numbers; faults as the lanes of the mask do."""
        offset = np.where(mask, address.astype(np.int64) - self.base, 0)
        inside = (offset >= 0) & (offset <= self.size - width * count)
        if not inside.all():
            raise _fault("outside of what was allocated", address, ~inside)
        aligned = offset % (width * count) == 0
        if not aligned.all():
            raise _fault(f"not a multiple of {width * count} bytes", address, ~aligned)
        at = offset // width
        wanted = np.frombuffer(bytes([right]) * width, f"u{width}")[0]
        rights = self.rights.view(f"u{width}")
        for i in range(count):
            allowed = (rights[at + i] & wanted == wanted) | ~mask
            if not allowed.all():
                raise _fault("not allocated" if right == READ else "not to be written", address, ~allowed)
        return at


def _fault(what: str, address: Array, wrong: Array) -> PtxError:
    lanes = np.flatnonzero(wrong)
    return PtxError(f"address {int(address[lanes[0]]):#x} is {what} (thread {lanes[0]}, {lanes.size} threads in all)")


class Memory(Space):
    """Global memory, which tensors are copied to and from."""

    def __init__(self, size: int = 1 << 28) -> None:
        super().__init__(0x7F00_0000_0000, size)
        self._used = _APART
        self._placed: dict[int, tuple[int, Tensor]] = {}  # by address of the storage on the host

    def allocate(self, size: int, misaligned: int = 0) -> int:
        """The address of so many bytes to read and write, a multiple of 256 bytes and `misaligned`."""
        at = -(-self._used // 256) * 256 + misaligned
        self._used = at + size + _APART
        if self._used > self.size:
            raise PtxError(f"out of memory: {self.size} bytes")
        self.open(at, size, READ | WRITE)
        return self.base + at

    def place(self, tensor: Tensor, writable: bool = False) -> int:
        """Where a tensor's first element is, as aligned as on the host; tensors of one storage stay parts of one."""
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._placed:
            self._placed[key] = (self.allocate(size, key % 256), tensor)
            at = self._placed[key][0] - self.base
            self.open(at, size, READ)[:] = _host(tensor)
        address = self._placed[key][0]
        at = address - self.base
        self.rights[at : at + size] |= WRITE if writable else 0
        return address + tensor.storage_offset() * tensor.element_size()

    def fetch(self) -> None:
        """Copies what kernels may have written back into the tensors."""
        for address, tensor in self._placed.values():
            at, size = address - self.base, tensor.untyped_storage().nbytes()
            if size and self.rights[at] & WRITE:
                _host(tensor)[:] = self.bytes[at : at + size]


def _host(tensor: Tensor) -> Array:
    """A tensor's storage as bytes."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


class Shared(Space):
    """The shared memory of all blocks, each with addresses of its own."""

    def __init__(self, blocks: int, size: int, block: Array) -> None:
        self._each = -(-size // 128) * 128 + _APART  # of all banks
        super().__init__(0, blocks * self._each)
        for b in range(blocks):
            self.open(b * self._each, size, READ | WRITE)
        self._block = block

    def load(self, address: Array, dtype: Any, count: int, mask: Array) -> list[Array]:
        return self.load_in(self._block, address, dtype, count, mask)

    def store(self, address: Array, values: list[Array], mask: Array) -> None:
        self.store_in(self._block, address, values, mask)

    def load_in(self, block: Array, address: Array, dtype: Any, count: int, mask: Array) -> list[Array]:
        """Of the blocks' memory."""
        return super().load(self._at(block, address), dtype, count, mask)

    def store_in(self, block: Array, address: Array, values: list[Array], mask: Array) -> None:
        super().store(self._at(block, address), values, mask)

    def _at(self, block: Array, address: Array) -> Array:
        at = address.astype(np.int64) - SHARED_BASE
        return np.where((at >= 0) & (at < self._each), at + block * self._each, -1)
