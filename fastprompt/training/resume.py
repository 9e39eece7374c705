"""What of a run goes into its checkpoint, and whether a checkpoint belongs to a run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastprompt.prompts.noise import Noise
from fastprompt.training.checkpoint import Checkpoint
from fastprompt.training.files import json_types
from fastprompt.training.fingerprint import other_backbone
from fastprompt.training.prepare import raise_problems
from fastprompt.training.state import Run
from fastprompt.training.stopping import JobState, snapshot


def pack_run(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The run's prompts, the best of them, and how its jobs stand: tensors by name, and state in JSON types."""
    tensors: dict[str, torch.Tensor] = {}
    for j, prompt in enumerate(run.prompts):
        tensors |= {f"prompt/{j}/{key}": tensor for key, tensor in snapshot(prompt).items()}
        tensors |= {f"best/{j}/{key}": tensor for key, tensor in run.best.get(j, {}).items()}
    noises = zip(run.prompts, run.first_draws, strict=True)
    return tensors, {
        "jobs": list(run.digests),
        "backbone": dict(run.backbone),
        "states": [state.to_dict() for state in run.states],
        "noise": [asdict(replace(prompt.noise, draws=first)) for prompt, first in noises],
    }


def unpack_run(run: Run, loaded: Checkpoint) -> None:
    """Put back what `pack_run` gave."""
    run.states = [JobState.from_dict(values) for values in loaded.state["states"]]
    run.mixture.stopped = {j for j, state in enumerate(run.states) if not state.running}
    for j, (prompt, noise) in enumerate(zip(run.prompts, loaded.state["noise"], strict=True)):
        prompt.load_state_dict(loaded.under(f"prompt/{j}"))
        prompt.noise = Noise(**noise)
        if best := loaded.under(f"best/{j}"):
            run.best[j] = best
    run.first_draws = [noise["draws"] for noise in loaded.state["noise"]]


def check_same_run(run: Run, newest: Path) -> None:
    """Raise unless the checkpoint was written by these jobs on these data, over this backbone."""
    held = Checkpoint.read(newest).state
    former, now = {d["name"]: d for d in held["jobs"]}, {d["name"]: d for d in run.digests}
    different = [f"job {name!r} is in one of them only" for name in former.keys() ^ now.keys()]
    if not different and list(former) != list(now):
        different = [f"its jobs stand in another order ({', '.join(former)})"]
    for name in former.keys() & now.keys():
        keys = [k for k in now[name] if json_types(now[name][k]) != former[name].get(k)]
        different += [f"job {name!r} has another {key}" for key in keys]
    if other := other_backbone(held["backbone"], run.backbone):
        different.append(other)
    raise_problems([f"{newest} belongs to another run: {d}; choose another output_dir" for d in different])
