"""Plain descriptions of a backbone and of a prefix; no torch modules, no transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from fastprompt.errors import ArgumentError


@dataclass(frozen=True)
class LayerShape:
    """Key/value geometry of one attention layer."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers one virtual token holds in this layer: its key and its value, all heads."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class BackboneSpec:
    """What a prompt must know about its backbone.

    `layers` lists the attention layers a prefix enters, in order (an encoder-decoder's
    decoder self-attention; none where the architecture takes embedding prompts only).
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    causal: bool
    encoder_decoder: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def fingerprint(self) -> str:
        """Digest of every field: two backbones with the same one take the same prompts."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for error messages."""
        shapes = sorted({(s.kv_heads, s.key_dim, s.value_dim) for s in self.layers})
        heads = ", ".join(f"{h} kv heads x {k}/{v}" for h, k, v in shapes) or "no attention layers"
        return f"{self.model_type} (hidden {self.hidden_size}, {self.num_layers} layers, {heads})"


@dataclass(frozen=True)
class Prefix:
    """A prompt as keys and values.

    `layers[i]` is the backbone layer that `keys[i]` `[Hkv, P, D]` and `values[i]` `[Hkv, P, Dv]` enter.
    """

    layers: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Prefix:
        """The prefix with `function` applied to every key and value tensor."""
        return Prefix(self.layers, tuple(map(function, self.keys)), tuple(map(function, self.values)))


def flat_width(spec: BackboneSpec, layers: Sequence[int]) -> int:
    """Numbers one virtual token holds over `layers`: the width of the flat `[P, width]` form."""
    return sum(spec.layers[i].width for i in layers)


def unflatten(flat: torch.Tensor, spec: BackboneSpec, layers: Sequence[int]) -> Prefix:
    """Views of a flat `[P, width]` tensor as a `Prefix`.

    Semantics: the columns hold, for each layer of `layers` in turn, its keys `[Hkv, D]` and then its values
    `[Hkv, Dv]`; with equal layers this is `flat.view(P, 2 * L, Hkv, D)` with keys in the even slots, the layout
    of PEFT's prefix tuning.
    """
    if flat.dim() != 2 or flat.shape[1] != flat_width(spec, layers):
        raise ArgumentError(
            f"flat prefix has shape {list(flat.shape)}, expected [P, {flat_width(spec, layers)}] "
            f"for {len(layers)} layers of {spec.describe()}"
        )
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    column = 0
    for i in layers:
        shape = spec.layers[i]
        for dim, out in ((shape.key_dim, keys), (shape.value_dim, values)):
            size = shape.kv_heads * dim
            block = flat[:, column : column + size]
            out.append(block.unflatten(1, (shape.kv_heads, dim)).transpose(0, 1))
            column += size
    return Prefix(tuple(layers), tuple(keys), tuple(values))


def flatten(prefix: Prefix) -> torch.Tensor:
    """The flat `[P, width]` form of a prefix; inverse of `unflatten`."""
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return torch.cat([t.transpose(0, 1).flatten(1) for pair in pairs for t in pair], dim=1)
