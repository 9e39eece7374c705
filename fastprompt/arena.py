"""The memory of a prompt bank: T tokens of keys and values for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt.errors import ArgumentError
from fastprompt.spec import LayerShape, Prefix

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ArenaShape:
    """What an arena's memory looks like, apart from how many tokens it holds."""

    layers: tuple[LayerShape, ...]
    devices: tuple[torch.device, ...]  # one a layer
    dtype: torch.dtype

    @staticmethod
    def build(
        layers: Sequence[LayerShape], devices: torch.device | str | Sequence[torch.device | str], dtype: torch.dtype
    ) -> ArenaShape:
        """A checked shape; `devices` is one for all layers or one a layer."""
        if dtype not in _DTYPES:
            raise ArgumentError(f"dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        each = [devices] * len(layers) if isinstance(devices, (torch.device, str)) else list(devices)
        if len(each) != len(layers):
            raise ArgumentError(
                f"devices lists {len(each)}, expected one device, or one for each of {len(layers)} layers"
            )
        known = {d: torch.empty(0, device=d).device for d in set(each)}  # "cuda" and "cuda:0" become one device
        return ArenaShape(tuple(layers), tuple(known[d] for d in each), dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in all layers on all devices together."""
        return sum(layer.width for layer in self.layers) * self.dtype.itemsize

    def stage(self, name: str, prefix: Prefix) -> Prefix:
        """A prompt's prefix, checked, in the arena's dtype and on its devices; copied only where it is not so yet.

        Raises ArgumentError for layers the arena lacks, wrong shapes, and numbers not finite in the arena's dtype.
        """
        self._check_layers(name, prefix)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for layer, key, value in zip(prefix.layers, prefix.keys, prefix.values, strict=True):
            want = self.layers[layer]
            for kind, tensor, dim, staged in (
                ("keys", key, want.key_dim, keys),
                ("values", value, want.value_dim, values),
            ):
                expected = [want.kv_heads, prefix.length, dim]
                if list(tensor.shape) != expected or not tensor.is_floating_point():
                    raise ArgumentError(
                        f"prompt {name!r}: {kind} of layer {layer} are {list(tensor.shape)} {tensor.dtype}, "
                        f"expected {expected} of a floating-point type"
                    )
                staged.append(tensor.detach().to(self.devices[layer], self.dtype))
                if not staged[-1].isfinite().all():
                    raise ArgumentError(
                        f"prompt {name!r}: {kind} of layer {layer} hold NaN or infinity as {self.dtype} (they came as "
                        f"{tensor.dtype}), expected finite numbers; mend the prompt, or choose a dtype with more range"
                    )
        return Prefix(prefix.layers, tuple(keys), tuple(values))

    def _check_layers(self, name: str, prefix: Prefix) -> None:
        """A prefix names layers there are, each once, with keys and values for each, and has at least one token."""
        counts = len(prefix.layers), len(prefix.keys), len(prefix.values)
        if not counts[0] or len(set(counts)) > 1:
            raise ArgumentError(
                f"prompt {name!r} has {counts[0]} layers, {counts[1]} keys and {counts[2]} values, "
                "expected as many of each and at least one"
            )
        if len(set(prefix.layers)) < counts[0] or not all(0 <= i < len(self.layers) for i in prefix.layers):
            raise ArgumentError(
                f"prompt {name!r} is for layers {list(prefix.layers)}, expected distinct ones below {len(self.layers)}"
            )
        if prefix.keys[0].dim() != 3 or not prefix.length:
            raise ArgumentError(
                f"prompt {name!r}: keys of layer {prefix.layers[0]} are {list(prefix.keys[0].shape)}, "
                "expected [Hkv, P, D] with at least one token"
            )


class Arena:
    """Keys `[Hkv, T, D]` and values `[Hkv, T, Dv]` of every layer, as views of one flat buffer a device.

    Semantics: on each device the layers follow one another, each with its keys and then its values, so that equal
    layers on one device are exactly a contiguous `[L, 2, Hkv, T, D]`. The memory starts uninitialised.
    """

    def __init__(self, shape: ArenaShape, tokens: int) -> None:
        self.shape = shape
        self.tokens = tokens
        widths: dict[torch.device, int] = {}
        for layer, device in zip(shape.layers, shape.devices, strict=True):
            widths[device] = widths.get(device, 0) + layer.width
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self._buffers = {d: torch.empty(w * tokens, dtype=shape.dtype, device=d) for d, w in widths.items()}
            self.keys, self.values = self._views(self._buffers)
            # Writers go through aliases with version counters of their own: autograd would otherwise take a write
            # to one prompt for a change of every prompt that a graph has saved.
            self._keys, self._values = self._views({d: buffer.data for d, buffer in self._buffers.items()})

    @property
    def nbytes(self) -> int:
        return self.tokens * self.shape.token_bytes

    def write(self, start: int, prefix: Prefix) -> None:
        """Copy a prefix of the arena's dtype and devices to the tokens from `start`."""
        span = slice(start, start + prefix.length)
        for layer, key, value in zip(prefix.layers, prefix.keys, prefix.values, strict=True):
            self._keys[layer][:, span].copy_(key)
            self._values[layer][:, span].copy_(value)

    def move(self, source: int, target: int, length: int, layers: Sequence[int]) -> None:
        """Copy tokens to another place, which may overlap the first, in the layers given."""
        for layer in layers:
            for tensor in (self._keys[layer], self._values[layer]):
                data = tensor[:, source : source + length]
                if abs(target - source) < length:
                    data = data.clone()
                tensor[:, target : target + length].copy_(data)

    def grown(self, tokens: int) -> Arena:
        """A larger arena with the same tokens at the same places; this one stays as it is."""
        new = Arena(self.shape, tokens)
        pairs = zip((*self._keys, *self._values), (*new._keys, *new._values), strict=True)
        for source, target in pairs:
            target[:, : self.tokens].copy_(source)
        return new

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this arena's memory."""
        buffer = self._buffers.get(tensor.device)
        return buffer is not None and tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()

    def _views(
        self, buffers: dict[torch.device, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Keys and values of every layer as views of the devices' buffers."""
        offsets = dict.fromkeys(buffers, 0)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for layer, device in zip(self.shape.layers, self.shape.devices, strict=True):
            for dim, views in ((layer.key_dim, keys), (layer.value_dim, values)):
                size = layer.kv_heads * self.tokens * dim
                block = buffers[device].narrow(0, offsets[device], size)
                views.append(block.view(layer.kv_heads, self.tokens, dim))
                offsets[device] += size
        return tuple(keys), tuple(values)
