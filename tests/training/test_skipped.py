"""Examples that a task leaves out: an epoch has those that are trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fastprompt as fp
from fastprompt import demo
from fastprompt.training import Job
from fastprompt.training.config import load_config
from fastprompt.training.data import load
from fastprompt.training.launch import check_launch, prepare_launch, sweep_file
from fastprompt.training.sweep import packing
from fastprompt.training.sweep.candidates import expand
from fastprompt.training.tasks import Probing

ROWS = [{"subject": f"{n} is", "object": "one" if n % 4 == 0 else "an unknown thing of many words"} for n in range(24)]


@pytest.fixture
def facts() -> Job:
    """A job on six of its 24 examples: the others are skipped, and are the longer ones."""
    word = next(
        w for w in ("a", "b", "c") if len(demo.tokenizer()(f" {w}", add_special_tokens=False)["input_ids"]) == 1
    )
    rows = [row | {"object": word} if row["object"] == "one" else row | {"subject": "x " * 40} for row in ROWS]
    return Job(
        name="facts",
        task=Probing(pattern="{subject} [MASK]", skip=True),
        train=load(rows),
        validation=load(rows),
        config=fp.PromptTuning(num_virtual_tokens=2),
        batch_size=2,
        epochs=2,
    )


def test_epochs_are_over_what_is_trained_on(model: fp.PromptedModel, facts: Job, tmp_path: Path) -> None:
    result = fp.train(model, [facts], output_dir=tmp_path).jobs["facts"]
    model.remove_prompt("facts")
    assert result.steps == 6  # two epochs of three steps, not of twelve
    assert [entry["step"] for entry in result.history] == [3, 6]  # once an epoch
    record = json.loads((tmp_path / "best" / "facts" / "prompt.json").read_text())["record"]["training"]
    assert record["examples"] == 6 and record["epochs"] == 2


def test_a_sweep_counts_them_too(model: fp.PromptedModel, facts: Job, tmp_path: Path) -> None:
    space = {"learning_rate": [0.01, 0.1, 0.2]}
    found = fp.sweep(model, [facts], space, output_dir=tmp_path, rungs=1, max_prompts_per_run=3)
    assert sorted((r["steps"], r["stopped"]) for r in found.results) == [(2, "pruned"), (2, "pruned"), (6, "finished")]
    with pytest.raises(fp.FastPromptError, match="one has 6: use fewer rungs"):
        fp.sweep(model, [facts], space, output_dir=tmp_path / "x", rungs=2)


def test_memory_is_measured_on_what_is_trained_on(model: fp.PromptedModel, facts: Job) -> None:
    room = packing.measure(model, expand([facts], {"num_virtual_tokens": [1, 2]}), None, {})
    assert [size for size, _ in room.peaks] == [1, 2] and model.prompt_names == []


def test_a_dry_run_and_a_file_count_them(facts: Job, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts.train))
    (tmp_path / "run.toml").write_text("""\
[run]
backbone = "embedded"
[[prompt]]
name = "facts"
method = "prompt_tuning"
num_virtual_tokens = 2
batch_size = 2
epochs = 2
task = { type = "probing", pattern = "{subject} [MASK]", skip = true }
data = { train = "rows.jsonl", validation = "rows.jsonl" }
[sweep]
rungs = 2
space = { learning_rate = [0.1] }
""")
    (job,) = check_launch(prepare_launch(load_config(tmp_path / "run.toml")))
    assert job.total_steps() == 6 and replace(job, steps=None, epochs=2).total_steps() == 24
    with pytest.raises(fp.FastPromptError, match=r"run.toml:12: sweep.rungs: .* one has 6"):
        sweep_file(tmp_path / "run.toml", output=tmp_path / "out")
