"""What a call of `train` asks for besides its jobs, and what of it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprompt.training.arguments import check_options
from fastprompt.training.checkpoint import checkpoints


@dataclass(frozen=True)
class Settings:
    """Keywords of `train`, which explains them."""

    output: Path | None
    resume: bool
    overwrite: bool
    save_every: int | None
    keep_checkpoints: int
    eval_batch_size: int
    backbone_dropout: bool
    load_best: bool
    seed: int
    options: dict[str, Any]

    def problems(self) -> list[str]:
        """Everything that is wrong with them, one sentence each."""
        found = check_options(self.options) + self._folder_problems()
        for name in ("save_every", "eval_batch_size", "keep_checkpoints"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int) or value < 1) and (
                value is not None or name != "save_every"
            ):
                found.append(f"{name} is {value!r}, expected an int >= 1")
        return found

    def _folder_problems(self) -> list[str]:
        found, output = [], self.output
        if output is None and (self.resume or self.save_every is not None):
            found.append("resume and save_every need a folder for checkpoints: give output_dir")
        if self.resume and self.overwrite:
            found.append("resume and overwrite are both given, and they contradict each other: leave one out")
        if output is not None and output.exists() and not output.is_dir():
            found.append(f"output_dir is {str(output)!r}, a file: choose a folder")
        elif output is not None and not (self.resume or self.overwrite) and checkpoints(output):
            found.append(f"output_dir {str(output)!r} holds checkpoints of a former run: pass resume or overwrite")
        return found
