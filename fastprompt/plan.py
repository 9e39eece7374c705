"""BatchPlan: the rows of one batch grouped by prompt, built once a step and used by every layer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fastprompt import costs, env, native
from fastprompt.errors import ArgumentError

SHARERS = costs.SHARERS
_FEWEST_SHARERS = 4
_LENGTH_BITS = 32  # a row's sorting key is its start above its length
_NO_PROMPT = 1 << 64
_INT32 = torch.iinfo(torch.int32)


class Decoding(NamedTuple):
    """A batch whose rows have one query each: its prompts, and their tokens, each counted once."""

    prompts: int
    tokens: int


@dataclass(frozen=True)
class BatchPlan:
    """Rows sorted by prompt, with the offsets of each prompt's rows.

    `packed` is one int32 tensor on the host, because only tensors and numbers cross the boundary of a registered
    op. It holds, for a capacity of C rows, `order [C] | group_offsets [C+1] | group_start [C] | group_len [C]`;
    entries without a row or group are -1. Its size depends on the capacity alone, so a compiled or captured step
    takes any batch that fits.

    `sharing` says which rows of one query read their prefix together (`paged_prefix_attention` on GPUs): one int32
    tensor on the device of the op's tensors, `tile_of_row [C] | tiles [C // 4, SHARERS]`. A tile holds the numbers of
    4 to SHARERS rows of one prompt, in order; -1 is no row, or no tile. None where no row shares.

    `decoding` is there where every row is known to have one query.
    """

    packed: torch.Tensor
    capacity: int
    sharing: torch.Tensor | None = None
    decoding: Decoding | None = None

    @classmethod
    def build(
        cls,
        prefix_start: Sequence[int] | torch.Tensor,
        prefix_len: Sequence[int] | torch.Tensor,
        *,
        capacity_rows: int | None = None,
        queries: Sequence[int] | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> BatchPlan:
        """Sorts the rows of a batch by prompt.

        Semantics::

            order = stable_sort(rows, key=(len == 0, start, len))   # rows without a prompt come last, as one group
            group g owns rows order[group_offsets[g] : group_offsets[g + 1]]
            and reads arena tokens group_start[g] .. group_start[g] + group_len[g] - 1
            its n rows of one query share the reading if n >= 4 and the device's cost table says that it pays

        `prefix_start`, `prefix_len`: integers, one a row; a tensor on an accelerator is copied to the host.
        `capacity_rows`: rows the plan has room for, by default the rows given. Rows may later carry other
        extents (another layer's arena, or none there) as long as the rows of one group still share theirs.
        `queries`: query tokens of each row; with them `sharing` is made, on `device`. It is always there where a
        capacity is given, as what is captured once must serve any batch.
        Raises `ArgumentError` when the lists differ in length, exceed the capacity, or hold negative lengths or numbers
        beyond int32.
        """
        starts, lens = _host(prefix_start), _host(prefix_len)
        capacity = len(starts) if capacity_rows is None else capacity_rows
        in_python = _in_python()
        if in_python:
            packed = _pack(_numbers(starts), _numbers(lens), capacity)
        else:
            packed = torch.empty(4 * max(capacity, 0) + 1, dtype=torch.int32)
            native.load().build_plan(packed, starts, lens, capacity)
        if queries is None:
            return cls(packed, capacity)
        counts, rules = _host(queries), costs.table(device)
        sharing = _sharing(packed, capacity, counts, len(starts), rules, in_python)
        keep = capacity_rows is not None or sharing is not None
        sharing = _nobody(capacity) if sharing is None else sharing
        lists = sharing.to(device, non_blocking=True) if keep else None
        return cls(packed, capacity, lists, _decoding(_numbers(starts), _numbers(lens), _numbers(counts)))

    def copy_(self, other: BatchPlan) -> BatchPlan:
        """Takes over another plan of the same capacity, in place: for a captured graph, before it is replayed.

        Raises `ArgumentError` when the capacities differ, or the other has `sharing` that this one has no room for, or
        rows that have not one query where all of this one's have.
        """
        if self.capacity != other.capacity:
            raise ArgumentError(
                f"plan has room for {self.capacity} rows, the other for {other.capacity}; build both with the same "
                "capacity_rows"
            )
        if self.sharing is None and other.sharing is not None:
            raise ArgumentError("plan has no room for sharing, the other has some; build both with queries")
        if self.decoding is not None and other.sharing is not None and other.decoding is None:
            raise ArgumentError("plan was built for rows of one query each, the other has rows of more or none")
        self.packed.copy_(other.packed)
        if self.sharing is not None:
            self.sharing.fill_(-1) if other.sharing is None else self.sharing.copy_(other.sharing, non_blocking=True)
        return self

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
    def tiles(self) -> torch.Tensor | None:
        """`[C // 4, SHARERS]`: rows that read their prefix together."""
        return None if self.sharing is None else self.sharing[self.capacity :].view(-1, SHARERS)

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


def sharing_capacity(sharing: torch.Tensor) -> int:
    """Rows that `BatchPlan.sharing` has room for; all of it where it has no room for tiles."""
    tiles, rest = divmod(sharing.shape[0], _FEWEST_SHARERS + SHARERS)
    return tiles * _FEWEST_SHARERS + rest


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


def _decoding(starts: list[int], lens: list[int], queries: list[int]) -> Decoding | None:
    if queries.count(1) != len(queries):
        return None
    prompts = {extent for extent in zip(starts, lens, strict=True) if extent[1]}
    return Decoding(len(prompts), sum(length for _, length in prompts))


def _sharing(
    packed: torch.Tensor,
    capacity: int,
    queries: list[int] | torch.Tensor,
    rows: int,
    table: costs.Table,
    in_python: bool,
) -> torch.Tensor | None:
    """`BatchPlan.sharing` on the host, None where no row shares."""
    if len(queries) != rows:
        raise ArgumentError(f"queries has {len(queries)} rows, prefix_start has {rows}; give one entry a row in both")
    lists = _nobody(capacity)
    if in_python:
        found = _share(packed, capacity, _numbers(queries), table, lists)
    else:
        rules = (SHARERS, _FEWEST_SHARERS, table.state_tokens, table.least_saving)
        found = native.load().share_prefixes(lists, packed, queries, capacity, *rules)
    return lists if found else None


def _nobody(capacity: int) -> torch.Tensor:
    """Room for `BatchPlan.sharing`, empty."""
    return torch.full((capacity + capacity // _FEWEST_SHARERS * SHARERS,), -1, dtype=torch.int32)


def _share(packed: torch.Tensor, capacity: int, queries: list[int], table: costs.Table, lists: torch.Tensor) -> bool:
    """Fills `BatchPlan.sharing` in plain Python and says whether any row shares; csrc/plan.cpp does the same."""
    order, offsets = unpack(packed)
    lens = packed[3 * capacity + 1 :].tolist()
    saving = 0
    tiles: list[list[int]] = []
    for group, (first, end) in enumerate(pairwise(offsets)):
        members = [row for row in order[first:end] if queries[row] == 1]
        count = len(members)
        parts = -(-count // SHARERS)
        saved = lens[group] * (count - parts) - table.state_tokens * count
        if count >= _FEWEST_SHARERS and saved > 0:
            saving += saved
            tiles += [members[i * count // parts : (i + 1) * count // parts] for i in range(parts)]
    if saving < table.least_saving:
        return False
    for i, members in enumerate(tiles):
        rows = torch.tensor(members)
        lists[rows] = i
        lists[capacity + i * SHARERS :][: len(members)] = rows.int()
    return True


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
