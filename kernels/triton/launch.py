"""Launching a kernel on the device of its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprompt._triton.tiles import Tiles


def launch(kernel: Any, programs: int, on: Tensor, tiles: Tiles, *args: Any, **meta: Any) -> None:
    """Runs so many programs on the device and current stream of `on`; nothing for none.

    `args` are the kernel's first parameters, each of one type in all calls; `meta` the rest, by name.
    """
    if programs == 0:
        return
    if not on.is_cuda or torch.version.hip:  # interpreted; and for AMD code depends on more than Launches knows
        kernel[(programs,)](*args, **meta, num_warps=tiles.warps, num_stages=tiles.stages)
    elif on.device.index == torch.cuda.current_device():
        _launches.run(kernel, programs, on.device.index, tiles, args, meta)
    else:
        with torch.cuda.device(on.device):
            _launches.run(kernel, programs, on.device.index, tiles, args, meta)


class Launches:
    """Compiled kernels by what they were launched with, so that another such launch looks nothing up in Triton.

    Triton compiles a kernel for the dtypes of its tensors, whether they begin at multiples of 16 bytes, and some
    values of numbers (1, multiples of 16). Here the values themselves are the key, which is no less.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def run(
        self, kernel: Any, programs: int, device: int, tiles: Tiles, args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        """Launches on this device, which is the current one, in its current stream."""
        given, key = list(args), list(args)
        for i, x in enumerate(args):
            if isinstance(x, Tensor):
                at = x.data_ptr()
                given[i], key[i] = at, (x.dtype, at % 16)
        which = (id(kernel), device, tiles, *key, *meta.values())
        known = self._known.get(which)
        if known is not None:
            compiled, constants = known
            compiled[(programs, 1, 1)](*given, *constants)
            return
        compiled = kernel[(programs,)](*args, **meta, num_warps=tiles.warps, num_stages=tiles.stages)
        if not hasattr(compiled, "packed_metadata"):  # what this Triton returns is not what it launches
            return
        if len(self._known) >= self._most:  # lengths that grow at every step
            self._known.clear()
        self._known[which] = compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])


_launches = Launches()


def rows_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """Indices or sinks as kernels read them, one behind the other."""
    return None if x is None else x.contiguous()


def target(like: Tensor, wanted: bool) -> Tensor | None:
    """Room for a gradient laid out as `like`, its last dimension contiguous; None where not wanted."""
    if not wanted:
        return None
    room = torch.empty_like(like)
    return room if room.shape[-1] < 2 or room.stride(-1) == 1 else like.new_empty(like.shape)


def placed(room: Tensor | None, like: Tensor | None) -> Tensor:
    """A gradient in the layout and dtype of its input; `[0]` where there is none."""
    if room is None or like is None:
        return torch.empty(0, device=None if like is None else like.device)
    target = torch.empty_like(like)
    return room if room.dtype == target.dtype and room.stride() == target.stride() else target.copy_(room)
