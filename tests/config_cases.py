"""A config file with data beside it, and the problems of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastprompt.errors import ConfigError
from fastprompt.training.config import load_config

Write = Callable[[str], Path]

GOOD = """\
[run]
backbone = "embedded"
seed = 3
accumulation = 2

[defaults]
learning_rate = 0.1
reparameterization = "mlp"
epochs = 3
[defaults.task]
type = "sequence_classification"
classes = ["good", "bad"]
truncate = "end"
[defaults.data]
train = "train.jsonl"
validation = "validation.jsonl"

[[prompt]]
name = "deep"
method = "p_tuning_v2"
num_virtual_tokens = 4
layers = "all"
weight_decay = 1

[[prompt]]
name = "soft"
method = "prompt_tuning"
num_virtual_tokens = 2
steps = 5
max_grad_norm = "none"
warmup = 0.1
task.classes = ["a", "b", "c"]

[[prompt]]
name = "second"
shares = "soft"
data.train_examples = 3
"""


def written(folder: Path, text: str) -> Path:
    """The path of a config file that says this, with data beside it."""
    rows = [{"text": f"it was {word}", "label": word} for word in ("good", "bad", "good", "bad", "bad")]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def problems_of(path: Path, *overrides: str) -> list[tuple[int | str, str, str]]:
    """The problems of a config file, as (line, key, message)."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    found = [problem.removeprefix(f"{path}:").split(": ", 2) for problem in caught.value.problems]
    return [(int(line) if line.isdigit() else line, key, message) for line, key, message in found]
