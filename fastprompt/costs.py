"""What decoding costs on a GPU by each of its paths: bytes and launches are counted, a table says what they take.

The tables are data (`costs.json`, or the file that FASTPROMPT_COSTS names): by a device's name, and one for all.
`python -m bench gpu-check` measures such a table. docs/kernels.md has the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastprompt import env
from fastprompt.errors import ArgumentError

PATHS = {
    "cuda": "one CUDA kernel; rows of a prompt read it together where the plan says so",
    "triton": "Triton; rows of a prompt read it together, and a second kernel merges",
    "single": "Triton; each row reads its prefix and its own keys in one pass",
}
EXAMPLE = "rows=128 prompts=8 P=256 S=512 heads=32/8 D=128 bytes=2"
SHARERS = 16  # most rows that read a prefix together
FULL = 264  # programs that fill a chip, two a multiprocessor of an H100 or H200; with fewer, keys are cut into parts
_MOST_PARTS = 16
PREFIX_PART = 128  # fewest keys of a part of a prefix that several rows read together
OWN_PART = {"cuda": 512, "triton": 256, "single": 256}  # and of the keys that a row reads alone, by path
_TILE = 64  # query rows of a tile that reads a prefix for several


@dataclass(frozen=True)
class Work:
    """What a path does: kernels launched, and bytes by kind.

    `unique`: read from memory, or written, at least once. `again`: read once more, mostly from the cache. `states`:
    partial results in float32, written and read.
    """

    launches: float
    unique: float
    again: float
    states: float


@dataclass(frozen=True)
class Decode:
    """A step of `rows` rows of one query, spread evenly over `prompts` prompts of `prefix` tokens each.

    `own`: own keys of a row. `itemsize`: bytes of a number.
    """

    rows: int
    prompts: int
    prefix: int
    own: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    itemsize: int = 2

    @classmethod
    def parse(cls, text: str) -> Decode:
        """From words as in `EXAMPLE`.

        Raises `ArgumentError` for a word that is not one of these, or sizes that do not fit together.
        """
        names = {"rows": "rows", "prompts": "prompts", "P": "prefix", "S": "own", "D": "dim", "bytes": "itemsize"}
        given: dict[str, int] = {}
        for word in text.replace(",", " ").split():
            name, _, value = word.partition("=")
            if name == "heads" and re.fullmatch(r"[1-9]\d*/[1-9]\d*", value):
                given["heads"], given["kv_heads"] = map(int, value.split("/"))
            elif name in names and re.fullmatch(r"\d+", value):
                given[names[name]] = int(value)
            else:
                raise ArgumentError(f"the shape has {word!r}, expected words as in {EXAMPLE!r}")
        missing = [
            short for short, name in names.items() if name in ("rows", "prompts", "prefix", "own") and name not in given
        ]
        if missing:
            raise ArgumentError(f"the shape lacks {', '.join(missing)}; heads, D and bytes default to 32/8, 128 and 2")
        shape = cls(**given)
        if min(shape.rows, shape.prompts, shape.dim, shape.itemsize) < 1 or shape.prompts > shape.rows:
            raise ArgumentError(
                f"the shape has {shape.rows} rows of {shape.prompts} prompts, expected 1 <= prompts <= rows"
            )
        if shape.heads % shape.kv_heads:
            raise ArgumentError(f"the shape has {shape.heads} heads over {shape.kv_heads}, expected a multiple")
        return shape

    def extents(self) -> tuple[list[int], list[int]]:
        """Starts and lengths of the rows' prefixes, the prompts side by side in an arena."""
        starts = [row * self.prompts // self.rows * self.prefix for row in range(self.rows)]
        return starts, [self.prefix] * self.rows

    def work(self, path: str, shared: bool) -> Work:
        """What a path does where rows read prompts together, or each for itself."""
        token = 2 * self.kv_heads * self.dim * self.itemsize
        unique = token * (self.prompts * self.prefix + self.rows * self.own)
        unique += 2 * self.rows * self.heads * self.dim * self.itemsize  # queries and results
        group = self.heads // self.kv_heads
        counts = [self.rows // self.prompts + (i < self.rows % self.prompts) for i in range(self.prompts)]
        alone = self.own if shared else self.prefix + self.own
        own = parts(self.rows * self.kv_heads, alone, OWN_PART[path])
        if shared:
            tiles = sum(-(-count // SHARERS) for count in counts)
            programs = -(-self.rows // SHARERS) * self.kv_heads * -(-SHARERS * group // _TILE)
            again = tiles - self.prompts
            states = own + parts(programs, self.prefix, PREFIX_PART)
        else:
            again = self.rows - self.prompts
            states = own if own > 1 else 0
        state = 2 * self.rows * self.heads * (self.dim + 1) * 4
        return Work(1 + (states > 0), unique, token * self.prefix * again, state * states)


@dataclass(frozen=True)
class Weights:
    """What a path takes: microseconds a launch, and bytes of each kind in units of a byte copied from memory."""

    launch_us: float
    unique: float
    again: float
    states: float


@dataclass(frozen=True, eq=False)
class Table:
    """The costs of a device, None being any, and the rules by which a plan lets rows share a prompt's reading.

    `state_tokens`: what a row that shares costs, in tokens of a prefix read once more. `least_saving`: such tokens
    that a batch must save.
    """

    device: str | None
    measured: bool
    source: str
    memory_gbs: float
    paths: Mapping[str, Weights]
    state_tokens: int
    least_saving: int

    @classmethod
    def parse(cls, written: Mapping[str, Any]) -> Table:
        """From an entry of the file; raises `ArgumentError` where it does not say everything."""
        try:
            costs, rules = written["paths"], written["sharing"]
            return cls(
                device=written["device"],
                measured=bool(written["measured"]),
                source=str(written["source"]),
                memory_gbs=float(written["memory_gbs"]),
                paths={
                    name: Weights(**{f.name: float(costs[name][f.name]) for f in fields(Weights)}) for name in PATHS
                },
                state_tokens=int(rules["state_tokens"]),
                least_saving=int(rules["least_saving"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"a cost table lacks {error}; `python -m bench gpu-check` writes whole ones") from None

    def microseconds(self, path: str, work: Work) -> float:
        """What a path takes for so much work."""
        weights = self.paths[path]
        each = weights.unique * work.unique + weights.again * work.again + weights.states * work.states
        return weights.launch_us * work.launches + each / self.memory_gbs / 1e3


def table(device: torch.device | str) -> Table:
    """The table for a device: that of its name, or else the one for all."""
    return _named(_name(torch.device(device)))


def load(path: Path | None = None) -> list[Table]:
    """All tables of a file; the package's own by default.

    Raises `ArgumentError` for a file that holds something else, or no table for any device.
    """
    source = path or resources.files("fastprompt") / "costs.json"
    try:
        written = json.loads(source.read_text())["tables"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"the cost tables {source} cannot be read: {error!r}") from None
    found = [Table.parse(entry) for entry in written]
    if not any(one.device is None for one in found):
        raise ArgumentError(f'the cost tables {source} have none for any device ("device": null)')
    return found


@cache
def _name(device: torch.device) -> str | None:
    """A GPU's name; asked for once, as every decoding call looks for its table."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if on_gpu else None


@cache
def _named(name: str | None) -> Table:
    given = env.costs()
    tables = {one.device: one for one in load(Path(given) if given else None)}
    return tables.get(name) or tables[None]


@lru_cache(4096)
def cheaper_than_cuda(table: Table, shape: Decode, shared: bool) -> str | None:
    """Why Triton is taken rather than CUDA, by the plan's way to read prompts; None where it does not cost less."""
    other = "triton" if shared else "single"
    cuda, triton = (table.microseconds(path, shape.work(path, shared)) for path in ("cuda", other))
    if cuda <= triton:
        return None
    return f"the cost table says {triton:.1f} us for Triton and {cuda:.1f} us for CUDA"


def parts(programs: int, keys: int, least: int) -> int:
    """In how many parts of at least so many keys those of a row are cut where programs are too few to fill a chip.

    What runs goes by capacities, so it may make more of them: those without keys cost next to nothing.
    """
    return max(1, min(keys // least, FULL // max(programs, 1), _MOST_PARTS))
