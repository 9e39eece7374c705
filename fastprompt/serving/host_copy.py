"""How a prompt is kept in host memory: as the model computes with it, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt.errors import ArgumentError
from fastprompt.prompts import PromptConfig, PromptHead, SoftPrompt
from fastprompt.spec import BackboneSpec, Prefix, flatten, unflatten

STORAGES: dict[str, tuple[torch.dtype, float] | None] = {  # name -> (type, its largest number); None: the model's type
    "model": None,
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}


@dataclass(frozen=True)
class Packed:
    """Tensors `[H, P, D]` in host memory.

    Semantics, of each tensor apart:
        numbers[h] = codes[h] * scales[h]     # scales [H, 1, 1] float32, none where codes are the numbers
    """

    codes: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...] | None
    dtype: torch.dtype  # of the numbers

    @staticmethod
    def of(tensors: Sequence[torch.Tensor], storage: str = "model", *, pinned: bool = False) -> Packed:
        """Copy tensors, wherever they are, in one of `STORAGES`; `pinned` is what a GPU copies from by itself."""
        if storage not in STORAGES:
            raise ArgumentError(f"storage is {storage!r}, expected one of {', '.join(STORAGES)}")
        dtype, kind = tensors[0].dtype, STORAGES[storage]
        if kind is None:
            return Packed(_on_host(tensors, pinned), None, dtype)
        packed = [_quantize(t, *kind) for t in tensors]
        codes, scales = (_on_host([pair[i] for pair in packed], pinned) for i in (0, 1))
        return Packed(codes, scales, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their scales."""
        return sum(t.nbytes for t in (*self.codes, *(self.scales or ())))

    def numbers(self, places: Sequence[torch.device]) -> list[torch.Tensor]:
        """The tensors, each on its device of `places`, in the dtype they were packed from."""
        tensors = [c.to(d, non_blocking=True) for c, d in zip(self.codes, places, strict=True)]
        if self.scales is None:
            return tensors
        scales = [s.to(d, non_blocking=True) for s, d in zip(self.scales, places, strict=True)]
        return [(c.float() * s).to(self.dtype) for c, s in zip(tensors, scales, strict=True)]


@dataclass(frozen=True)
class HostCopy:
    """A prefix in host memory: its layers' keys `[Hkv, P, D]`, then their values `[Hkv, P, Dv]`."""

    layers: tuple[int, ...]
    packed: Packed

    @staticmethod
    def pack(prefix: Prefix, storage: str = "model", *, pinned: bool = False) -> HostCopy:
        """Copy a prefix, as `Packed.of` does; 8 bits have a scale for each kv head of keys and of values."""
        tensors = [t.detach() for t in (*prefix.keys, *prefix.values)]
        return HostCopy(prefix.layers, Packed.of(tensors, storage, pinned=pinned))

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.packed.nbytes

    def prefix(self, devices: Sequence[torch.device]) -> Prefix:
        """The prefix, site i's tensors on `devices[i]`, in the dtype it was packed from."""
        tensors = self.packed.numbers([devices[layer] for layer in self.layers] * 2)
        half = len(self.layers)
        return Prefix(self.layers, tuple(tensors[:half]), tuple(tensors[half:]))


@dataclass(frozen=True)
class PromptCopy:
    """A prompt in host memory, its virtual tokens as `Packed`, its head as it is."""

    config: PromptConfig
    spec: BackboneSpec
    packed: Packed
    head: tuple[str, dict[str, torch.Tensor]] | None
    labels: tuple[str, ...] | None
    task_type: str | None

    @staticmethod
    def of(prompt: SoftPrompt, storage: str = "model") -> PromptCopy:
        """Copy a prompt; 8 bits have a scale for each kv head, or for each virtual token of an embedding prompt."""
        weights, head = prompt.weights(), None
        if prompt.head is not None:
            head = prompt.head.module, {n: t.detach().to("cpu", copy=True) for n, t in prompt.head.tensors().items()}
        tensors = [weights[:, None]]
        if prompt.kind == "prefix":
            prefix = unflatten(weights, prompt.spec, prompt.config.prefix_layers(prompt.spec))
            tensors = [*prefix.keys, *prefix.values]
        packed = Packed.of(tensors, storage)
        return PromptCopy(prompt.config, prompt.spec, packed, head, prompt.labels, prompt.task_type)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.packed.nbytes + sum(t.nbytes for t in (self.head[1].values() if self.head else ()))

    def prompt(self) -> SoftPrompt:
        """A prompt of its own, frozen, on the CPU."""
        tensors = self.packed.numbers([torch.device("cpu")] * len(self.packed.codes))
        weights, half = tensors[0][:, 0], len(tensors) // 2
        if self.config.kind == "prefix":
            layers = self.config.prefix_layers(self.spec)
            weights = flatten(Prefix(layers, tuple(tensors[:half]), tuple(tensors[half:])))
        made = self.config.restore(self.spec, weights)
        made.head = None if self.head is None else PromptHead(*self.head)
        made.labels, made.task_type = self.labels, self.task_type
        return made.requires_grad_(False)


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
