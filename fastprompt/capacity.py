"""How many prompts fit where, and how often they must be loaded: arithmetic on sizes, without any model.

Hit rates are Che's approximation of an LRU cache under independent requests (Che, Tung and Wang 2002, "Hierarchical web
caching systems", section III; why it is so accurate: Fricker, Robert and Roberts 2012, arXiv 1202.3974).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastprompt.errors import ArgumentError
from fastprompt.spec import BackboneSpec

KINDS = ("prefix", "embedding")
_STORED = 4  # bytes of a number on disk: float32
_HALVINGS = 200  # of an interval, beyond what a float64 can tell apart


@dataclass(frozen=True)
class Footprint:
    """Bytes of one prompt: in the memory that its engine budgets, in host memory, and on disk without its JSON."""

    kind: str
    length: int
    device: int
    host: int
    file: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of a device: all of it, a share kept free for activations, weights, and rows' own keys and values."""

    memory: int
    weights: int
    own: int
    reserve: float = 0.1

    @property
    def left(self) -> int:
        """What prompts may take. Errors: ArgumentError where nothing is left."""
        left = int(self.memory * (1 - self.reserve)) - self.weights - self.own
        if left <= 0:
            raise ArgumentError(
                f"memory is {self.memory} bytes; less {self.reserve:.0%}, weights ({self.weights}) and own tokens "
                f"({self.own}) it leaves {left} for prompts: give more, or fewer rows or shorter ones"
            )
        return left


@dataclass(frozen=True)
class Traffic:
    """Requests a second under `prompts` prompts, the i-th with probability proportional to i ** -exponent."""

    prompts: int
    exponent: float
    rate: float

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.exponent < 0 or self.rate < 0:
            raise ArgumentError(f"{self} came, expected at least one prompt, an exponent and a rate of at least 0")

    def popularity(self) -> NDArray[np.float64]:
        """Probabilities `[prompts]`, in falling order (Zipf's law)."""
        weights = np.arange(1, self.prompts + 1, dtype=np.float64) ** -self.exponent
        return weights / weights.sum()

    def distinct(self, rows: int) -> float:
        """How many prompts `rows` requests are expected to have between them."""
        return float(-np.expm1(rows * np.log1p(-np.minimum(self.popularity(), 1 - 1e-16))).sum())


@dataclass(frozen=True)
class Hits:
    """Shares of requests whose prompt is on the device, else in host memory, else read from disk."""

    device: float
    host: float
    disk: float


def token_bytes(spec: BackboneSpec, itemsize: int) -> int:
    """Bytes that one token's keys and values take in all layers of the (decoder's) self-attention."""
    return sum(layer.width for layer in spec.layers) * itemsize


def footprint(spec: BackboneSpec, kind: str, length: int, itemsize: int) -> Footprint:
    """What a prompt of `length` virtual tokens in all layers takes.

    Semantics:
        decoder   device = host = length * token_bytes, for "embedding" too: it is compiled to keys and values
        encoder   device = host = file: its engine budgets the files of loaded prompts
        file      float32: keys and values of every layer, or `length` embeddings
    Heads are not counted, nor is `prompt.json`, of a few KiB.
    """
    if kind not in KINDS or length < 1:
        raise ArgumentError(f"kind is {kind!r} and length {length}, expected one of {', '.join(KINDS)} and at least 1")
    file = length * (token_bytes(spec, _STORED) if kind == "prefix" else spec.hidden_size * _STORED)
    held = length * token_bytes(spec, itemsize) if spec.causal else file
    return Footprint(kind, length, held, held, file)


def hits(traffic: Traffic, on_device: int, on_host: int = 0) -> Hits:
    """Where requests find their prompts, with room for so many on the device and in host memory, both LRU.

    Semantics: p_i popularity; t solves sum_i (1 - exp(-p_i * t)) = room; 1 - exp(-p_i * t) is the chance to be there.
    What is on the device came through host memory, so the two together hold what the larger alone would.
    """
    popularity = traffic.popularity()
    missed, read = (float(popularity @ (1 - _held(popularity, room))) for room in (on_device, max(on_device, on_host)))
    return Hits(1 - missed, missed - read, read)


def _held(rates: NDArray[np.float64], capacity: int) -> NDArray[np.float64]:
    """The probability of each item to be in an LRU cache of `capacity` items, asked for at these rates."""
    if not 0 < capacity < len(rates):
        return np.full_like(rates, capacity > 0)
    low, high = 0.0, 1.0
    while -np.expm1(-rates * high).sum() < capacity:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if -np.expm1(-rates * middle).sum() < capacity:
            low = middle
        else:
            high = middle
    return -np.expm1(-rates * high)
