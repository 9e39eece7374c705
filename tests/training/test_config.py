"""Config files: what they give."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from config_cases import GOOD, problems_of, written

import fastprompt as fp
from fastprompt.training.config import load_config
from fastprompt.training.config.fields import field_names
from fastprompt.training.config.reference import reference
from fastprompt.training.config.tables import PromptTable
from fastprompt.training.job import Job
from fastprompt.training.launch import check_launch, prepare_launch
from fastprompt.training.tasks import TASKS


@pytest.fixture
def write(tmp_path):
    return partial(written, tmp_path)


@pytest.fixture
def problems(write):
    """The problems of a config, as (line, key, message)."""
    return lambda text, *overrides: problems_of(write(text), *overrides)


def test_prompts_get_defaults_that_fit_them(write):
    config = load_config(write(GOOD))
    deep, soft, second = config.prompts
    assert deep.config == fp.PTuningV2(num_virtual_tokens=4, layers=None, reparameterization="mlp")
    assert soft.config == fp.PromptTuning(num_virtual_tokens=2) and second.config is None
    assert (deep.table.epochs, deep.table.steps) == (3.0, None)
    assert (soft.table.epochs, soft.table.steps) == (None, 5)
    assert (deep.table.max_grad_norm, soft.table.max_grad_norm) == (1.0, None)
    assert {p.table.learning_rate for p in config.prompts} == {0.1}
    assert soft.task.classes == ("a", "b", "c") and soft.task.truncate == "end"
    assert second.data.train_examples == 3 and second.data.validation == "validation.jsonl"
    assert (config.run.seed, config.run.accumulation) == (3, 2)


def test_jobs_have_everything_that_was_said(write):
    path = write(GOOD.replace('task.classes = ["a", "b", "c"]', ""))
    launch = prepare_launch(load_config(path))
    check_launch(launch)
    assert launch.model.prompt_names == []
    deep, soft, second = launch.jobs
    assert (deep.weight_decay, deep.warmup, deep.total_steps()) == (1.0, 0, 1)
    assert (soft.warmup, soft.steps, soft.max_grad_norm, second.shares) == (0.1, 5, None, "soft")
    assert (len(deep.train), len(second.train), len(second.validation)) == (5, 3, 5)
    assert launch.options["options"]["gradient_accumulation_steps"] == 2 and launch.options["seed"] == 3
    assert next(launch.model.backbone.parameters()).dtype == torch.float32
    assert str(launch.output) == "run-run"


def test_prompt_tables_have_every_field_of_a_job():
    derived = {"task", "train", "validation", "config"}
    assert {f.name for f in dataclasses.fields(Job)} - derived == set(PromptTable.model_fields) - {
        "method",
        "task",
        "data",
    }
    defaults = {f.name: f.default for f in dataclasses.fields(Job) if f.default is not dataclasses.MISSING}
    for name, field in PromptTable.model_fields.items():
        if name in defaults and not field.is_required():
            assert field.default == defaults[name], name


def test_overrides_replace_what_the_file_says(write):
    overrides = ["run.seed=9", "prompt.deep.epochs=1.5", "prompt.1.learning_rate=0.5", "run.backbone=./elsewhere"]
    config = load_config(write(GOOD), overrides)
    assert (config.run.seed, config.run.backbone) == (9, "./elsewhere")
    assert load_config(write(GOOD), ["defaults.steps=7"]).prompts[0].table.steps == 7  # in place of epochs
    assert config.prompts[0].table.epochs == 1.5 and config.prompts[1].table.learning_rate == 0.5


def test_a_template_gives_its_number_of_virtual_tokens(write, problems):
    text = """\
[run]
backbone = "embedded"
[[prompt]]
name = "fact"
method = "p_tuning"
template = "{3} {text} {2}"
steps = 1
task.type = "causal_lm"
data.train = "train.jsonl"
"""
    (entry,) = load_config(write(text)).prompts
    assert entry.config == fp.PTuning(num_virtual_tokens=5, in_place=True) and entry.template.columns == ("text",)
    assert problems(text.replace("{text}", "[MASK]"))[0][:2] == (6, "prompt[0].template")
    line, key, message = problems(text.replace("steps", "num_virtual_tokens = 4\nsteps"))[0]
    assert (line, key) == (6, "prompt[0].template") and "num_virtual_tokens=5" in message


def test_the_guide_has_the_reference_and_its_files_are_right(write):
    docs = Path(__file__).resolve().parents[2] / "docs"
    guide = (docs / "training.md").read_text()
    assert (docs / "config-files.md").read_text().endswith(reference())
    run, sweep = re.findall(r"^```toml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert [entry.name for entry in load_config(write(run)).prompts] == ["capital", "plural"]
    found = load_config(write(sweep), sweep=True).candidates
    methods = [entry.config.method for *_, entry in found]
    assert (methods.count("prompt_tuning"), methods.count("p_tuning_v2")) == (10, 20)
    assert {row for row in re.findall(r"^\| `(\w+)` \| `[A-Z]\w+` \|", guide, re.MULTILINE)} == set(TASKS)


def test_methods_have_no_key_that_prompts_have():
    common = set(PromptTable.model_fields)
    from fastprompt.prompts import METHODS

    assert all(not field_names(cls) & common for cls in METHODS.values())
