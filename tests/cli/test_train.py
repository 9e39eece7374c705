"""`fastprompt train`: a config file in, prompts and results out."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import transformers

import fastprompt as fp
from fastprompt.cli.live import progress_table, standing
from fastprompt.training import Progress
from fastprompt.training.stopping import JobState

CONFIG = """\
[run]
backbone = "{backbone}"
seed = 1

[defaults]
batch_size = 4
steps = 6
evaluate_every = 3
learning_rate = 0.1
[defaults.task]
type = "causal_lm"
[defaults.data]
train = "train.jsonl"
validation = "validation.jsonl"

[[prompt]]
name = "soft"
method = "prompt_tuning"
num_virtual_tokens = 3

[[prompt]]
name = "deep"
method = "p_tuning_v2"
num_virtual_tokens = 2
layers = [-1]
steps = 3
"""
CLASSES = """\
[run]
backbone = "{backbone}"
[defaults]
batch_size = 4
epochs = 1
[defaults.task]
type = "sequence_classification"
classes = ["ab", "cd"]
[defaults.data]
train = "train.jsonl"
validation = "validation.jsonl"
[[prompt]]
name = "one"
method = "prefix_tuning"
num_virtual_tokens = 2
[[prompt]]
name = "two"
method = "prompt_tuning"
num_virtual_tokens = 2
"""


@pytest.fixture
def config(tmp_path, backbone):
    """Writes a config file with data beside it; returns its path."""
    for name, count in (("train", 8), ("validation", 4)):
        words = [("ab", "cd")[i % 2] for i in range(count)]
        rows = [{"text": f"{w} {i}", "target": w, "label": w} for i, w in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(text=CONFIG):
        (tmp_path / "run.toml").write_text(text.format(backbone=backbone))
        return tmp_path / "run.toml"

    return write


def test_prompts_are_trained_scored_and_saved(run, config, backbone, tmp_path):
    out = tmp_path / "out"
    data = json.loads(run("train", config(), "--output", out, "--json").stdout)
    assert json.loads((out / "results.json").read_text()) == data
    soft, deep = data["prompts"]
    assert [p["name"] for p in data["prompts"]] == ["soft", "deep"]
    assert (soft["steps"], deep["steps"], data["run"]["steps"]) == (6, 3, 6)
    assert [h["step"] for h in soft["history"]] == [3, 6] and deep["stopped"] == "finished"
    assert soft["trained_parameters"] == 3 * 32 and deep["trained_parameters"] == 2 * 2 * 16
    assert soft["metric"] == "log_likelihood" and soft["score"] == max(
        h["scores"]["log_likelihood"] for h in soft["history"]
    )
    model = fp.PromptedModel(transformers.AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32))
    for prompt in data["prompts"]:
        loaded = model.load_prompt(prompt["name"], prompt["folder"])
        assert loaded.record["training"]["scores"] == prompt["scores"] and prompt["stored_bytes"] > 0


def test_the_table_names_prompts_and_where_they_are(run, config, tmp_path):
    shown = run("train", config(), "--output", tmp_path / "out", env={"COLUMNS": "140"})
    for words in ("soft", "prompt_tuning", "log_likelihood", "finished", "2 prompts in one run", str(tmp_path / "out")):
        assert words in shown.stdout.replace("\n", "")


def test_a_dry_run_checks_everything_and_trains_nothing(run, fails_with, config, tmp_path):
    path = config()
    plan = json.loads(run("train", path, "--dry-run", "--json").stdout)
    assert [p["steps"] for p in plan["prompts"]] == [6, 3] and plan["output"] == "run-run"
    assert "nothing trained" in run("train", path, "--dry-run").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml", "train.jsonl", "validation.jsonl"]
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    (line,) = set(fails_with("train", path, "--dry-run"))
    assert re.search(r"run.toml:13: defaults.data.train: .*column 'target' is missing", line)


def test_problems_come_a_line_each(fails_with, config):
    lines = fails_with("train", config(), "--set", "prompt.soft.steps=0", "--set", "run.sed=1", "--dry-run")
    assert len(lines) == 2
    assert all(line.startswith("error: --set ") for line in lines)


def test_without_the_extra_it_says_what_to_install(fails, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for command in ("train", "sweep"):
        assert "needs datasets, which is not installed: pip install 'fastprompt[train]'" in fails(command, config())


def test_a_run_is_resumed_or_begun_anew_when_asked(run, fails, config, tmp_path):
    path, out = config(), tmp_path / "out"
    first = json.loads(run("train", path, "--output", out, "--json").stdout)
    assert "resume" in fails("train", path, "--output", out)
    again = json.loads(run("train", path, "--output", out, "--resume", "--json").stdout)
    for before, after in zip(first["prompts"], again["prompts"], strict=True):
        assert before == after
    anew = json.loads(
        run("train", path, "--output", out, "--overwrite", "--set", "prompt.soft.steps=3", "--json").stdout
    )
    assert anew["prompts"][0]["steps"] == 3


def test_other_ways_to_learn_stand_beside_the_prompts(run, config, tmp_path):
    arguments = ("--output", tmp_path / "out", "--compare", "full,probe,probe_mean,lora")
    data = json.loads(run("train", config(CLASSES), *arguments, "--json").stdout)
    lines = {(line["task"], line["way"]): line for line in data["comparison"]}
    # both prompts learn the same from the same data: every other way does that once
    assert [way for task, way in lines] == ["prefix_tuning", "prompt_tuning", "full", "probe", "probe_mean", "lora"]
    assert lines["one", "probe"]["trained_parameters"] == 2 * 32 + 2
    assert lines["one", "probe"]["stored_bytes"] == 4 * (2 * 32 + 2)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(
        re.search(r'backbone = "(.*)"', (tmp_path / "run.toml").read_text())[1], num_labels=2
    )
    assert lines["one", "full"]["trained_parameters"] == whole.num_parameters()
    lora = lines["one", "lora"]["trained_parameters"]
    assert 2 * 32 < lora < whole.num_parameters()
    assert lines["two", "prompt_tuning"]["score"] == data["prompts"][1]["score"]
    for line in data["comparison"]:
        assert 0 <= line["score"] <= 1 and line["step_seconds"] > 0 and line["refused"] is None
        assert line["peak_memory"] > 2**20 and line["metric"] == "accuracy"


def test_ways_that_cannot_learn_a_task_say_so(run, fails, config, tmp_path):
    arguments = ("--output", tmp_path / "out", "--compare", "probe,full", "--json")
    data = json.loads(run("train", config(), "--set", "defaults.steps=2", *arguments).stdout)
    ways = {line["way"]: line for line in data["comparison"]}
    assert "a linear probe classifies" in ways["probe"]["refused"] and ways["full"]["score"] is not None
    assert "expected full, lora, probe, probe_mean" in fails("train", config(), "--compare", "full,bitfit")


def test_comparators_in_the_file_have_settings_of_their_own(run, config, tmp_path):
    other = '[[comparator]]\nkind = "lora"\nrank = 1\nsteps = 3\nprompts = ["two"]\ntarget_modules = ["q_proj"]\n'
    path = config(CLASSES + other)
    shown = run("train", path, "--output", tmp_path / "out", env={"COLUMNS": "140"}).stdout
    assert "Ways to learn" in shown and "lora" in shown
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    (line,) = [line for line in data["comparison"] if line["way"] == "lora"]
    assert (line["task"], line["steps"]) == ("two", 3)
    assert line["trained_parameters"] == 2 * (32 + 32) + 2 * 32  # A and B in two layers, and the head


def test_the_live_table_follows_prompts():
    def state(name, best, stopped=None):
        history = [{"step": 4, "scores": {"f1": best}}] if best is not None else []
        return JobState(name, "f1", best, 4, stopped=stopped, stopped_at=4 if stopped else None, history=history)

    states = {s.name: s for s in (state("a", 0.25), state("b", None), state("c", 0.5, "patience"))}
    progress = Progress(step=5, steps=10, seconds=2.0, losses={"a": 1.5}, rates={}, states=states)
    assert standing(states) == ["c", "a", "b"]
    table = progress_table(progress)
    assert table.title == "step 5 of 10, 2 s, about 2 s to go"
    cells = [list(map(str, column.cells)) for column in table.columns]
    assert cells[0] == ["a", "b", "c"] and cells[1] == ["5", "5", "4"] and cells[2] == ["1.5", "", ""]
    assert cells[4] == ["0.25", "", "0.5"] and cells[6] == ["trains", "trains", "patience"]
    few = progress_table(progress, 2)
    assert list(map(str, few.columns[0].cells)) == ["c", "a"] and few.caption == "the best 2 of 3; 2 train"
