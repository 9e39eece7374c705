"""Shapes at which prefix attention is measured: those with targets of their own, and a sparse grid around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

BASELINES = {  # what ours is compared to; each name with what it is
    "concatenated": "the best correct form of SDPA on keys that are concatenated already",
    "explicit": "two matrix products and a softmax on keys that are concatenated already",
    "expanded": "PEFT's way: expand the prefixes over the rows, concatenate, SDPA",
    "folded": "SDPA with rows of one prompt folded into query rows, merged with SDPA over the own keys",
    "reference": "fastprompt in plain PyTorch",
}
FEW_QUERIES = 16  # up to here it is decoding


@dataclass(frozen=True)
class Case:
    """One shape. `targets[baseline, dtype]` is the least ratio where it is not 1.

    `ragged`: prompts of unequal length, the longest `prefix`, and of unequal popularity. `strided`: heads after
    tokens in memory, as a model hands them over. `padded`: rows padded on the left. `rotate`: every call reads inputs
    that the caches no longer hold. `judged`: the share of the machine's ceiling has a target too. `paged`: own keys lie
    in the pages of a cache, which is `paged_prefix_attention`.
    """

    rows: int
    prompts: int
    prefix: int
    queries: int
    keys: int
    heads: tuple[int, int] = (16, 16)
    dim: int = 64
    causal: bool = True
    backward: bool = False
    ragged: bool = False
    strided: bool = False
    padded: bool = False
    window: int | None = None
    rotate: bool = False
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    targets: Mapping[tuple[str, str], float] = field(default_factory=lambda: MappingProxyType({}))
    judged: bool = False
    paged: bool = False

    @property
    def op(self) -> str:
        return "paged_prefix_attention" if self.paged else "prefix_attention"

    @property
    def name(self) -> str:
        """All that distinguishes the shape, in one line; `--cases` matches it."""
        kind = "train" if self.backward else "decode" if self.queries == 1 else "few" if self.few else "prefill"
        words = [kind, f"B{self.rows}", f"prompts{self.prompts}", f"P{self.prefix}"]
        words += [f"S{self.keys}"] if self.queries == 1 else [f"N{self.queries}"]
        words += [f"S{self.keys}"] if 1 < self.queries < self.keys else []
        words += [f"{self.heads[0]}/{self.heads[1]}", f"D{self.dim}"]
        words += ["causal" if self.causal else "bidirectional"] if self.queries > 1 else []
        words += [flag for flag in ("ragged", "strided", "padded") if getattr(self, flag)]
        words += [f"window{self.window}"] if self.window else []
        words += ["paged"] if self.paged else []
        return " ".join(words)

    @property
    def few(self) -> bool:
        return self.queries <= FEW_QUERIES

    def least(self, baseline: str, dtype: str) -> float:
        """The target of the ratio baseline / ours: never slower, or what the case demands."""
        return self.targets.get((baseline, dtype), 1.0)

    def lengths(self) -> list[int]:
        """Virtual tokens of each prompt."""
        spread = max(self.prefix // 2, 1) if self.ragged else 1
        return [self.prefix - t * 37 % spread for t in range(self.prompts)]

    def prompt_of(self) -> list[int]:
        """The prompt each row reads; the rows of a prompt do not follow each other."""
        power = 2 if self.ragged else 1  # with the square, the first prompts are read most
        by_prompt = [b**power * self.prompts // self.rows**power for b in range(self.rows)]
        stride = next(n for n in (7, 11, 13, 17) if math.gcd(n, self.rows) == 1)
        return [by_prompt[b * stride % self.rows] for b in range(self.rows)]

    def first_keys(self) -> list[int]:
        """Own keys each row is padded by on the left."""
        most = self.keys // 2 if self.padded else 0
        return [b * 29 % (most + 1) for b in range(self.rows)]

    def shrunk(self) -> Case:
        """The same kind of case at a size that only shows that it runs."""
        rows = min(self.rows, 4)
        prompts = rows if self.prompts == self.rows else min(self.prompts, 3)
        queries = self.queries if self.few else 20
        keys = queries if self.queries == self.keys else max(min(self.keys, 24), queries)
        return replace(
            self, rows=rows, prompts=prompts, prefix=min(self.prefix, 9), queries=queries, keys=keys,
            window=self.window and 8,
        )  # fmt: skip


def _decode(
    rows: int, prompts: int, prefix: int, keys: int, heads: tuple[int, int], dim: int = 64, **more: Any
) -> Case:
    return Case(rows, prompts, prefix, more.pop("queries", 1), keys, heads, dim, **more)


def _prefill(
    rows: int, prompts: int, prefix: int, tokens: int, heads: tuple[int, int], dim: int = 64, **more: Any
) -> Case:
    return Case(rows, prompts, prefix, tokens, tokens, heads, dim, **more)


def _targets(
    concatenated: tuple[float, float], expanded: tuple[float, float] | None = None
) -> Mapping[tuple[str, str], float]:
    """Of a pair for fp32 and bf16 each."""
    given = {"concatenated": concatenated} | ({"expanded": expanded} if expanded else {})
    return MappingProxyType(
        {
            (name, dtype): value
            for name, pair in given.items()
            for dtype, value in zip(("fp32", "bf16"), pair, strict=True)
        }
    )


H12, H16, H16_4, H32_8, H32_2, H8_1 = (12, 12), (16, 16), (16, 4), (32, 8), (32, 2), (8, 1)

# As the prototype was measured: one prompt for prefill, buffers hot, keys contiguous by head.
TABLE = tuple(
    replace(case, judged=True)
    for case in (
        _prefill(8, 1, 64, 128, H12, targets=_targets((2.2, 4.0), (2.4, 4.2))),
        _prefill(8, 1, 64, 128, H12, causal=False, targets=_targets((1.8, 3.1), (1.9, 3.2))),
        _prefill(2, 1, 128, 512, H12, targets=_targets((2.3, 4.1))),
        _prefill(8, 1, 64, 128, H16_4, targets=_targets((2.2, 3.5))),
        _prefill(8, 1, 64, 128, H12, backward=True, targets=_targets((2.1, 5.0))),
        _decode(32, 1, 512, 64, H16, targets=_targets((8.0, 9.0), (16.0, 50.0))),
        _decode(32, 4, 512, 512, H16, targets=_targets((1.8, 2.4), (6.0, 15.0))),
        _decode(32, 1, 512, 64, H32_8, targets=_targets((6.0, 5.0), (9.0, 11.0))),
        _decode(128, 128, 16, 64, H16),
        _decode(1, 1, 64, 64, H16, targets=_targets((2.0, 2.0))),
    )
)

_FP16 = ("fp16",)
_GRID_DECODE = (
    _decode(1, 1, 0, 1, H16),
    _decode(1, 1, 16, 1, H32_8),
    _decode(1, 1, 0, 512, H12),
    _decode(1, 1, 64, 64, H32_8, 128),
    _decode(1, 1, 512, 512, H16),
    _decode(1, 1, 2048, 64, H8_1, 128),
    _decode(1, 1, 2048, 2048, H32_2),
    _decode(8, 1, 1, 64, H16_4),
    _decode(8, 1, 128, 64, H12),
    _decode(8, 8, 100, 64, H16_4, 80),
    _decode(8, 2, 512, 512, H32_8, 128),
    _decode(8, 8, 2048, 64, H8_1, 128),
    _decode(8, 1, 512, 2048, H32_8, window=1024),
    _decode(8, 1, 512, 512, H32_8, 128, dtypes=_FP16),
    _decode(32, 1, 0, 64, H16),
    _decode(32, 1, 16, 1, H16_4),
    _decode(32, 1, 64, 64, H12),
    _decode(32, 1, 2048, 64, H16_4),
    _decode(32, 4, 128, 64, H16, dtypes=_FP16),
    _decode(32, 4, 128, 512, H32_8),
    _decode(32, 4, 64, 512, H16, padded=True),
    _decode(32, 5, 512, 64, H32_2, 96, ragged=True, strided=True),
    _decode(32, 8, 100, 64, H16, ragged=True),
    _decode(32, 32, 64, 64, H16_4),
    _decode(32, 32, 16, 512, H8_1, 256),
    _decode(32, 32, 512, 64, H32_8, padded=True, strided=True),
    _decode(128, 1, 128, 64, H16),
    _decode(128, 1, 512, 64, H32_8),
    _decode(128, 1, 2048, 1, H12, 32),
    _decode(128, 16, 64, 64, H16_4, ragged=True),
    _decode(128, 128, 1, 64, H12),
    _decode(128, 128, 100, 64, H8_1, 128),
    _decode(1, 1, 64, 512, H32_8, queries=8),
    _decode(8, 1, 128, 64, H16, queries=2),
    _decode(8, 2, 100, 512, H32_2, queries=16),
    _decode(8, 8, 512, 512, H16_4, queries=4, ragged=True),
    _decode(32, 1, 512, 64, H12, queries=4),
    _decode(128, 1, 16, 64, H8_1, 80, queries=2),
)
_GRID_PREFILL = (
    _prefill(1, 1, 0, 64, H12),
    _prefill(1, 1, 16, 64, H16_4),
    _prefill(1, 1, 64, 512, H32_8, 128),
    _prefill(1, 1, 128, 2048, H8_1, 128),
    _prefill(1, 1, 2048, 64, H12),
    _prefill(1, 1, 64, 2048, H12, window=256),
    _prefill(2, 1, 128, 512, H16_4, window=128, strided=True),
    _prefill(2, 1, 512, 512, H16_4, 80),
    _prefill(2, 2, 64, 512, H8_1, 256),
    Case(2, 2, 64, 128, 512, H32_8),
    _prefill(4, 4, 128, 512, H16_4, ragged=True, strided=True),
    _prefill(8, 1, 1, 64, H16_4),
    _prefill(8, 1, 16, 128, H16, 32),
    _prefill(8, 1, 64, 128, H12, padded=True),
    _prefill(8, 1, 64, 128, H16_4, dtypes=_FP16),
    _prefill(8, 1, 100, 64, H12, causal=False),
    _prefill(8, 2, 512, 64, H32_2),
    _prefill(8, 3, 100, 128, H12, causal=False, ragged=True, strided=True, padded=True),
    _prefill(8, 4, 128, 64, H12, 96),
    _prefill(8, 8, 16, 64, H16),
    _prefill(8, 8, 64, 128, H16, strided=True),
    _prefill(32, 1, 64, 16, H12),
    _prefill(32, 32, 16, 64, H12),
    _prefill(128, 1, 100, 8, H12, 32),
    _prefill(2, 1, 512, 512, H16_4, backward=True),
    _prefill(4, 1, 100, 128, H8_1, 80, padded=True, backward=True),
    _prefill(8, 1, 64, 128, H12, causal=False, backward=True),
    _prefill(8, 8, 16, 64, H16_4, backward=True),
    _prefill(32, 8, 20, 64, H12, ragged=True, strided=True, backward=True),
)
# A layer's keys are cold when decoding comes to it: the other layers' went through the caches meanwhile.
GRID = tuple(replace(case, rotate=True) for case in _GRID_DECODE) + _GRID_PREFILL
SETS = {"table": TABLE, "grid": GRID, "all": TABLE + GRID}
