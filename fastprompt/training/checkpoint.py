"""What a checkpoint holds: prompts, heads, optimiser, schedules, how jobs stand and random generators. No backbone.

A checkpoint is the folder `checkpoint-STEP` of three files: tensors, everything else as JSON, and the Trainer's own
state. It is written under another name and renamed, so that a run killed at any moment finds a whole one.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors_torch

from fastprompt.errors import PromptFileError
from fastprompt.folders import replace_folder
from fastprompt.training.files import dumps

TENSORS, STATE, TRAINER_STATE = "training.safetensors", "training.json", "trainer_state.json"
VERSION = 2
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and state in JSON types."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    def under(self, start: str) -> dict[str, torch.Tensor]:
        """Tensors whose name begins with `start` and a slash, by the rest of it."""
        return {k.removeprefix(f"{start}/"): t for k, t in self.tensors.items() if k.startswith(f"{start}/")}

    def write(self, folder: Path, trainer_state: Mapping[str, Any]) -> None:
        """Write the checkpoint as `folder`, all of it or nothing."""
        tensors = safetensors_torch.save({k: t.detach().cpu().contiguous() for k, t in self.tensors.items()})
        state = {"version": VERSION, "sha256": hashlib.sha256(tensors).hexdigest(), **self.state}
        files = {
            TENSORS: tensors,
            STATE: dumps(state).encode(),
            TRAINER_STATE: dumps(trainer_state).encode(),
        }
        replace_folder(folder, files, overwrite=True)

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """The checkpoint in `folder`; PromptFileError if it is not whole."""
        try:
            state = json.loads((folder / STATE).read_bytes())
            tensors = (folder / TENSORS).read_bytes()
        except (OSError, ValueError) as error:
            raise PromptFileError(f"{folder} is not a training checkpoint ({error}): choose another one") from None
        if state.get("version") != VERSION:
            raise PromptFileError(
                f"{folder} has version {state.get('version')}, expected {VERSION}: it was written by another fastprompt"
            )
        if hashlib.sha256(tensors).hexdigest() != state["sha256"]:
            raise PromptFileError(f"{folder / TENSORS} does not match its digest: it was altered")
        return Checkpoint(safetensors_torch.load(tensors), state)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    found = checkpoints(folder)
    for old in found[: max(0, len(found) - count)]:
        shutil.rmtree(old, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The optimiser's tensors by name, and its groups in JSON types."""
    state = optimizer.state_dict()
    tensors = {f"{i}/{key}": value for i, values in state["state"].items() for key, value in values.items()}
    return tensors, [{k: list(v) if isinstance(v, tuple) else v for k, v in g.items()} for g in state["param_groups"]]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Put back what `pack_optimizer` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    betas = {"betas"}
    packed = [{k: tuple(v) if k in betas else v for k, v in group.items()} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": packed})


def random_state(device: torch.device) -> dict[str, Any]:
    """This process's generators in JSON types."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, [int(k) for k in keys], position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put this process's generators back."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
