"""What a run was asked for, as it travels from the command to its worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprompt import dispatch
from fastprompt.errors import FastPromptError

OURS = "ours"


@dataclass(frozen=True)
class Setting:
    """`impl` None is what the ops choose by themselves; a quick run has tiny sizes and judges nothing.

    `rates` are the ceilings of this run: bytes a second by "memory", operations a second by dtype.
    """

    device: str = "cuda"
    impl: str | None = None
    quick: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def repeats(self) -> int:
        """How often a result must be the same to the last bit."""
        return 3 if self.quick else 20

    def chosen(self, op: str, dtype: torch.dtype) -> str:
        """The implementation that is ours and takes every call; on a GPU not plain PyTorch unless it was asked for."""
        device = torch.device(self.device)
        name = dispatch.choose(op, self.impl, device, dtype)
        if name == "cuda" and not dispatch.asked(self.impl):
            name = dispatch.choose_behind(op, name, "it takes decoding rows only", None, device, dtype)
        if self.on_gpu and self.impl is None and name == "reference":
            raise RuntimeError(f"{op} has no kernel that runs here: {dispatch.obstacle(op, 'triton')}")
        return name

    def others(self, op: str, dtype: torch.dtype) -> list[str]:
        """Further implementations of an op that run on this GPU."""
        found = []
        for name in dispatch.IMPLS if self.on_gpu and self.impl is None else ():
            if name in ("reference", "cpu", self.chosen(op, dtype)):
                continue
            try:
                found.append(dispatch.choose(op, name, torch.device(self.device), dtype))
            except FastPromptError:  # it cannot run here, and `fastprompt info` says why
                continue
        return found

    def impls(self, op: str, dtype: torch.dtype) -> list[str]:
        """All implementations of an op to check, the one that the op chooses first."""
        return [self.chosen(op, dtype), *self.others(op, dtype)]

    def request(self) -> dict[str, Any]:
        return {"device": self.device, "impl": self.impl, "quick": self.quick, "rates": dict(self.rates)}
