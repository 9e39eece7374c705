"""BatchPlan: the rows of one batch grouped by prompt, built once a step and used by every layer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt import env, native
from fastprompt.errors import ArgumentError

_LENGTH_BITS = 32  # a row's sorting key is its start above its length
_NO_PROMPT = 1 << 64
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class BatchPlan:
    """Rows sorted by prompt, with the offsets of each prompt's rows.

    `packed` is one int32 tensor on the host, because only tensors and numbers cross the boundary of a registered
    op. It holds, for a capacity of C rows, `order [C] | group_offsets [C+1] | group_start [C] | group_len [C]`;
    entries without a row or group are -1. Its size depends on the capacity alone, so a compiled or captured step
    takes any batch that fits. Work lists that kernels want beside it (tiles, split-KV) belong in further tensors
    of this class.
    """

    packed: torch.Tensor
    capacity: int

    @classmethod
    def build(
        cls,
        prefix_start: Sequence[int] | torch.Tensor,
        prefix_len: Sequence[int] | torch.Tensor,
        *,
        capacity_rows: int | None = None,
    ) -> BatchPlan:
        """Sorts the rows of a batch by prompt.

        Semantics::

            order = stable_sort(rows, key=(len == 0, start, len))   # rows without a prompt come last, as one group
            group g owns rows order[group_offsets[g] : group_offsets[g + 1]]
            and reads arena tokens group_start[g] .. group_start[g] + group_len[g] - 1

        `prefix_start`, `prefix_len`: integers, one a row; a tensor on an accelerator is copied to the host.
        `capacity_rows`: rows the plan has room for, by default the rows given. Rows may later carry other
        extents (another layer's arena, or none there) as long as the rows of one group still share theirs.
        Raises `ArgumentError` when the two differ in length, exceed the capacity, or hold negative lengths or numbers
        beyond int32.
        """
        starts, lens = _host(prefix_start), _host(prefix_len)
        capacity = len(starts) if capacity_rows is None else capacity_rows
        if _in_python():
            return cls(_pack(_numbers(starts), _numbers(lens), capacity), capacity)
        packed = torch.empty(4 * max(capacity, 0) + 1, dtype=torch.int32)
        native.load().build_plan(packed, starts, lens, capacity)
        return cls(packed, capacity)

    @property
    def order(self) -> torch.Tensor:
        """`[C]`: row numbers, sorted by prompt."""
        return self.packed[: self.capacity]

    @property
    def group_offsets(self) -> torch.Tensor:
        """`[C+1]`: where each group's rows begin in `order`; the last used entry is the number of rows."""
        return self.packed[self.capacity : 2 * self.capacity + 1]

    @property
    def group_start(self) -> torch.Tensor:
        """`[C]`: first arena token of each group's prompt."""
        return self.packed[2 * self.capacity + 1 : 3 * self.capacity + 1]

    @property
    def group_len(self) -> torch.Tensor:
        """`[C]`: length of each group's prompt."""
        return self.packed[3 * self.capacity + 1 :]

    @property
    def num_rows(self) -> int:
        return int((self.order >= 0).sum())

    @property
    def num_groups(self) -> int:
        return int((self.group_len >= 0).sum())


def unpack(packed: torch.Tensor) -> tuple[list[int], list[int]]:
    """`order` and `group_offsets` of a packed plan as lists without the empty entries."""
    capacity = packed.shape[0] // 4
    values = packed[: 2 * capacity + 1].tolist()
    order, offsets = values[:capacity], values[capacity:]
    rows = offsets.index(-1) if offsets[-1] < 0 else len(offsets)
    offsets = offsets[:rows]
    return order[: offsets[-1]], offsets


def _in_python() -> bool:
    """Whether plans are built in Python: where the extension is missing or unwanted, or a compiler looks on."""
    return torch.compiler.is_compiling() or env.default_impl() == "reference" or native.obstacle() is not None


def _host(values: Sequence[int] | torch.Tensor) -> list[int] | torch.Tensor:
    """As the extension takes them."""
    if isinstance(values, torch.Tensor):
        return values if values.is_cpu and values.dtype in (torch.int32, torch.int64) else values.tolist()
    return values if type(values) is list else list(values)


def _numbers(values: list[int] | torch.Tensor) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else values


def _pack(starts: list[int], lens: list[int], capacity: int) -> torch.Tensor:
    """`BatchPlan.packed` in plain Python; csrc/plan.cpp does the same."""
    _check(starts, lens, capacity)
    rows = len(starts)
    keys = [s << _LENGTH_BITS | n if n else _NO_PROMPT for s, n in zip(starts, lens, strict=True)]
    order = sorted(range(rows), key=keys.__getitem__)
    offsets, group_start, group_len = [], [], []
    previous = -1
    for at, row in enumerate(order):
        if at == 0 or keys[row] != previous:
            previous = keys[row]
            offsets.append(at)
            group_start.append(starts[row] if lens[row] else 0)
            group_len.append(lens[row])
    offsets.append(rows)
    blank = [-1] * (capacity - len(group_start))
    packed = order + [-1] * (capacity - rows) + offsets + blank + group_start + blank + group_len + blank
    return torch.frombuffer(array("i", packed), dtype=torch.int32)


def _check(starts: list[int], lens: list[int], capacity: int) -> None:
    if len(starts) != len(lens):
        raise ArgumentError(
            f"prefix_start has {len(starts)} rows and prefix_len has {len(lens)}; give one entry a row in both"
        )
    if capacity < len(starts):
        raise ArgumentError(f"capacity_rows is {capacity}, the batch has {len(starts)} rows; raise the capacity")
    for row, (start, length) in enumerate(zip(starts, lens, strict=True)):
        if length < 0:
            raise ArgumentError(f"prefix_len[{row}] is {length}, expected 0 (no prompt) or more")
        for name, value in (("prefix_len", length), ("prefix_start", start if length else 0)):
            if not _INT32.min <= value <= _INT32.max:
                raise ArgumentError(f"{name}[{row}] is {value}, expected a number that fits int32")
