"""Which tile sizes a kernel runs with: one small table, looked up by shapes and dtypes; nothing is measured."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from fastprompt import costs


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps that share it, and how many loads ahead its loop runs."""

    rows: int
    keys: int
    warps: int
    stages: int


def block(size: int) -> int:
    """The power of two a head size is padded to; matrix products need 16."""
    return max(16, 1 << (size - 1).bit_length())


def forward(dim: int, dtype: torch.dtype, rows: int, rich: bool = False) -> Tiles:
    """For prefix_attention: `dim` the larger block of head sizes, `rows` the query rows of a key-value head.

    `rich`: logits are more than products, and need room in registers.
    """
    large = _lean(_look_up(_FORWARD, dim, dtype), rich)
    if rows >= large.rows:
        return large
    fewer = max(16, block(rows))
    return Tiles(fewer, large.keys, large.warps if dtype.itemsize == 4 else min(large.warps, 4), large.stages)


def together(tile: Tiles, dim: int, dtype: torch.dtype, rows: int) -> tuple[int, Tiles]:
    """For a launch whose other programs take `tile`: query rows of a tile that reads a prefix for `rows` of them.

    And the tile for all, with fewer keys where a large one finds no room in the registers of four warps.
    """
    most = 16 if dtype.itemsize == 4 else 32 if dim > 128 else 64
    crowded = _machine() == "cuda" and dim == 128 and dtype.itemsize == 2 and tile.warps == 4
    return min(most, block(rows)), tile._replace(keys=tile.keys // 2) if crowded else tile


def backward_queries(dim: int, dtype: torch.dtype, rich: bool = False) -> Tiles:
    """For the gradient of queries; float32 up to 128."""
    return _lean(_look_up(_BACKWARD_QUERIES, dim, dtype), rich)


def backward_keys(dim: int, dtype: torch.dtype, rich: bool = False) -> Tiles:
    """For the gradients of keys and values, own and of the arena; float32 up to 128."""
    return _lean(_look_up(_BACKWARD_KEYS, dim, dtype), rich)


def splits(programs: int, rows: int) -> int:
    """In how many parts the rows of a batch are cut where programs are too few to fill a chip.

    The number depends on shapes alone, so that sums are made in one order on every device.
    """
    return max(1, min(rows, _FULL // max(programs, 1)))


_FULL = costs.FULL


def _lean(tiles: Tiles, rich: bool) -> Tiles:
    """Half the rows and keys, and no loads ahead, for rich logits."""
    rows, keys = (min(n, max(16, n // 2)) for n in tiles[:2])
    return Tiles(rows, keys, tiles.warps, 1) if rich else tiles


def _look_up(table: dict[tuple[Any, ...], Tiles], dim: int, dtype: torch.dtype) -> Tiles:
    """Numbers of four bytes take no tensor cores on NVIDIA chips, and one small tile on most."""
    key = (dtype.itemsize, max(dim, 64))
    return table.get((_machine(), *key)) or table[key]


@cache
def _machine() -> str:
    """Chips by what a program may share: data-centre ones since Hopper 227 KiB, other NVIDIA 99, AMD 64."""
    if torch.version.hip:
        return "hip"
    if not torch.cuda.is_available():
        return "cuda"  # whatever the interpreter is given
    return "large" if torch.cuda.get_device_capability()[0] in (9, 10) else "cuda"


_FORWARD = {
    ("large", 2, 64): Tiles(128, 64, 8, 3),
    ("large", 2, 128): Tiles(128, 64, 8, 2),
    ("large", 2, 256): Tiles(64, 32, 8, 2),
    ("cuda", 2, 64): Tiles(128, 64, 8, 3),
    ("cuda", 2, 128): Tiles(64, 64, 8, 2),
    ("cuda", 2, 256): Tiles(64, 32, 8, 2),
    ("hip", 2, 64): Tiles(128, 64, 8, 1),
    ("hip", 2, 128): Tiles(64, 32, 8, 1),
    ("hip", 2, 256): Tiles(64, 32, 8, 1),
    (4, 64): Tiles(32, 32, 8, 1),
    (4, 128): Tiles(16, 16, 8, 1),
    ("cuda", 4, 128): Tiles(16, 16, 4, 1),
    (4, 256): Tiles(16, 16, 4, 1),
}
_BACKWARD_QUERIES = {
    ("large", 2, 64): Tiles(128, 64, 8, 2),
    ("large", 2, 128): Tiles(64, 64, 8, 2),
    ("large", 2, 256): Tiles(64, 32, 8, 2),
    ("cuda", 2, 64): Tiles(64, 64, 8, 2),
    ("cuda", 2, 128): Tiles(64, 64, 8, 2),
    ("cuda", 2, 256): Tiles(32, 32, 8, 1),
    ("hip", 2, 64): Tiles(64, 64, 8, 1),
    ("hip", 2, 128): Tiles(64, 32, 8, 1),
    ("hip", 2, 256): Tiles(32, 32, 4, 1),
    (4, 64): Tiles(16, 16, 8, 1),
    (4, 128): Tiles(8, 16, 8, 1),
    ("hip", 4, 128): Tiles(16, 16, 8, 1),
}
_BACKWARD_KEYS = {
    ("large", 2, 64): Tiles(64, 64, 8, 2),
    ("large", 2, 128): Tiles(32, 64, 8, 2),
    ("large", 2, 256): Tiles(32, 32, 8, 1),
    ("cuda", 2, 64): Tiles(32, 64, 8, 2),
    ("cuda", 2, 128): Tiles(32, 64, 8, 2),
    ("cuda", 2, 256): Tiles(32, 32, 8, 1),
    ("hip", 2, 64): Tiles(32, 64, 8, 1),
    ("hip", 2, 128): Tiles(32, 32, 8, 1),
    ("hip", 2, 256): Tiles(16, 32, 8, 1),
    (4, 64): Tiles(16, 16, 4, 1),
    (4, 128): Tiles(16, 16, 4, 1),
    ("cuda", 4, 128): Tiles(32, 16, 4, 1),
}
