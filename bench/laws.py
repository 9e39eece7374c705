"""Cost laws: how time and memory grow with one size while the others stand still, and the shapes to see it on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.attention_cases import Case

_HEADS = (16, 4)
FEWEST = 4  # points that a fit to the large end takes


@dataclass(frozen=True)
class Law:
    """What grows, and cases by how large it is."""

    name: str
    about: str
    points: dict[int, Case]


@dataclass(frozen=True)
class Fit:
    """`y = c * x ** exponent` by least squares of logarithms; `error` is the standard error of the exponent."""

    exponent: float
    error: float
    points: int
    first: float
    last: float


def exponent(value: float, places: int = 2) -> str:
    """An exponent as it is shown: rounded, and never -0.00."""
    return f"{round(value, places) + 0.0:.{places}f}"


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The exponent through all points; None where there are fewer than three or a value is not positive."""
    if len(x) < 3 or min(*x, *y) <= 0:
        return None
    across, up = ([math.log(v) for v in values] for values in (x, y))
    middle, level = sum(across) / len(x), sum(up) / len(x)
    spread = sum((a - middle) ** 2 for a in across)
    slope = sum((a - middle) * (b - level) for a, b in zip(across, up, strict=True)) / spread
    left = sum((b - level - slope * (a - middle)) ** 2 for a, b in zip(across, up, strict=True))
    return Fit(slope, math.sqrt(left / (len(x) - 2) / spread), len(x), x[0], x[-1])


def large_end(x: Sequence[float]) -> int:
    """Where the upper half of so many points begins."""
    return max(0, min(len(x) // 2, len(x) - FEWEST))


def _decode(rows: int, prompts: int, virtual: int, keys: int = 64) -> Case:
    return Case(rows, prompts, virtual, 1, keys, _HEADS, rotate=True)


def _powers(first: int, last: int) -> list[int]:
    return [1 << i for i in range(first.bit_length() - 1, last.bit_length())]


LAWS = (
    Law(
        "virtual tokens, one prompt",
        "decoding 32 rows of one prompt of so many virtual tokens, 64 own keys each",
        {p: _decode(32, 1, p) for p in _powers(16, 4096)},
    ),
    Law(
        "virtual tokens, 32 prompts",
        "the same, every row under a prompt of its own",
        {p: _decode(32, 32, p) for p in _powers(16, 1024)},
    ),
    Law(
        "prompts in the batch",
        "decoding 64 rows of so many prompts of 256 virtual tokens, 64 own keys each",
        {t: _decode(64, t, 256) for t in _powers(1, 64)},
    ),
    Law(
        "rows",
        "decoding so many rows of one prompt of 256 virtual tokens, 64 own keys each",
        {b: _decode(b, 1, 256) for b in _powers(1, 256)},
    ),
    Law(
        "context",
        "decoding 32 rows of 4 prompts of 64 virtual tokens, so many own keys each",
        {s: _decode(32, 4, 64, s) for s in _powers(16, 2048)},
    ),
    Law(
        "virtual tokens, prefill",
        "8 rows of 64 tokens, causal, one prompt of so many virtual tokens",
        {p: Case(8, 1, p, 64, 64, _HEADS) for p in _powers(16, 1024)},
    ),
)

_ROWS = 32
REGION = {  # (virtual tokens, rows a prompt) -> decoding 32 rows
    (p, each): _decode(_ROWS, _ROWS // each, p) for each in (1, 2, 4, 8, 16, 32) for p in (1, 4, 16, 64, 256, 1024)
}
