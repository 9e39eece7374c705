"""How a prefix is kept in host memory: as the model computes with it, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt.errors import ArgumentError
from fastprompt.spec import Prefix

STORAGES: dict[str, tuple[torch.dtype, float] | None] = {  # name -> (type, its largest number); None: the model's type
    "model": None,
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}


@dataclass(frozen=True)
class HostCopy:
    """A prefix in host memory.

    Semantics, of each layer's keys and of its values apart:
        numbers[h] = codes[h] * scales[h]     # h: kv head; scales [Hkv, 1, 1] float32, none where codes are the numbers
    """

    layers: tuple[int, ...]
    codes: tuple[torch.Tensor, ...]  # keys of every layer [Hkv, P, D], then values [Hkv, P, Dv]
    scales: tuple[torch.Tensor, ...] | None
    dtype: torch.dtype  # of the numbers

    @staticmethod
    def pack(prefix: Prefix, storage: str = "model", *, pinned: bool = False) -> HostCopy:
        """Copy a prefix, wherever it is, in one of `STORAGES`; `pinned` memory is what a GPU copies from by itself."""
        if storage not in STORAGES:
            raise ArgumentError(f"storage is {storage!r}, expected one of {', '.join(STORAGES)}")
        tensors = [t.detach() for t in (*prefix.keys, *prefix.values)]
        dtype, kind = tensors[0].dtype, STORAGES[storage]
        if kind is None:
            return HostCopy(prefix.layers, _on_host(tensors, pinned), None, dtype)
        packed = [_quantize(t, *kind) for t in tensors]
        codes, scales = (_on_host([pair[i] for pair in packed], pinned) for i in (0, 1))
        return HostCopy(prefix.layers, codes, scales, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their scales."""
        return sum(t.nbytes for t in (*self.codes, *(self.scales or ())))

    def prefix(self, devices: Sequence[torch.device]) -> Prefix:
        """The prefix, site i's tensors on `devices[i]`, in the dtype it was packed from."""
        places = [devices[layer] for layer in self.layers] * 2
        tensors = [c.to(d, non_blocking=True) for c, d in zip(self.codes, places, strict=True)]
        if self.scales is not None:
            scales = [s.to(d, non_blocking=True) for s, d in zip(self.scales, places, strict=True)]
            tensors = [(c.float() * s).to(self.dtype) for c, s in zip(tensors, scales, strict=True)]
        half = len(self.layers)
        return Prefix(self.layers, tuple(tensors[:half]), tuple(tensors[half:]))


def _quantize(tensor: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the nearest numbers, and each head's scale: its largest magnitude becomes the type's."""
    numbers = tensor.float()
    top = numbers.abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.where(top > 0, top / largest, 1.0)
    codes = (numbers / scale).clamp(-largest, largest)  # rounding may exceed it
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def _on_host(tensors: Sequence[torch.Tensor], pinned: bool) -> tuple[torch.Tensor, ...]:
    """Tensors of their own in host memory: a view would keep all of its base."""
    made = []
    for tensor in tensors:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        made.append(host.copy_(tensor))
    return tuple(made)
