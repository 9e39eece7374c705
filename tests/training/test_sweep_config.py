"""Sweeps from config files."""

from __future__ import annotations

import json

import pytest

from fastprompt import demo
from fastprompt.errors import ConfigError
from fastprompt.training import load_config, sweep_file
from fastprompt.training.sweep.plot import plot

CONFIG = """\
[run]
backbone = "embedded"
[defaults]
steps = 4
batch_size = 2
task.type = "causal_lm"
data = { train = "train.jsonl", validation = "train.jsonl" }
[[prompt]]
name = "a"
hidden_size = 16
[[prompt]]
name = "b"
method = "p_tuning_v2"
reparameterization = "mlp"
hidden_size = 8
[sweep]
rungs = 1
eta = 2
max_prompts_per_run = 5
[sweep.space]
method = ["prompt_tuning", "prefix_tuning"]
num_virtual_tokens = [1, 2]
learning_rate = { low = 0.01, high = 0.1, log = true, points = 2 }
"""


@pytest.fixture
def write(tmp_path):
    def make(text):
        rows = [json.dumps({"text": x, "target": y}) for x, y in demo.tasks(["capital"])[0].train[:6]]
        (tmp_path / "train.jsonl").write_text("\n".join(rows))
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return make


def test_a_config_gives_every_prompt_its_candidates(write):
    text = CONFIG.replace("hidden_size = 16", 'reparameterization = "mlp"').replace(
        'name = "a"', 'name = "a"\nmethod = "prefix_tuning"'
    )
    found = load_config(write(text), sweep=True).candidates
    assert [name for _, name, _, _ in found] == [f"{base}-{i}" for base in "ab" for i in range(8)]
    assert {e.config.method for _, _, _, e in found} == {"prompt_tuning", "prefix_tuning"}
    deep = found[12][3]
    assert (deep.config.hidden_size, deep.config.reparameterization, deep.table.learning_rate) == (8, "mlp", 0.01)


@pytest.mark.parametrize("methods", ['["prompt_tuning", "p_tuning"]', '["p_tuning", "prompt_tuning"]'])
def test_defaults_are_for_every_method_of_the_space_that_has_them(write, methods):
    text = (
        CONFIG.replace("hidden_size = 16\n", "")
        .replace('method = "p_tuning_v2"\nreparameterization = "mlp"\nhidden_size = 8\n', "")
        .replace("num_virtual_tokens = [1, 2]\n", "")
        .replace('["prompt_tuning", "prefix_tuning"]', methods)
        .replace("[defaults]", '[defaults]\nnum_virtual_tokens = 3\ntemplate = "{2} {text} {1}"\nencoder = "mlp"')
    )
    found = load_config(write(text), sweep=True).candidates
    assert len(found) == 8
    for *_, entry in found:
        placed = entry.config.method == "p_tuning"
        assert (entry.template is not None) == placed and getattr(entry.config, "in_place", False) == placed
        assert entry.config.num_virtual_tokens == 3 and getattr(entry.config, "encoder", "mlp") == "mlp"


def test_a_config_is_swept(write, tmp_path):
    text = CONFIG.replace("hidden_size = 16\n", "").replace(
        'method = ["prompt_tuning", "prefix_tuning"]', 'method = ["prompt_tuning"]'
    )
    text = text.replace('reparameterization = "mlp"\nhidden_size = 8\n', "").replace('method = "p_tuning_v2"\n', "")
    result = sweep_file(write(text), output=tmp_path / "out", overrides=["defaults.steps=2"])
    assert [r["name"] for r in result.results] == [f"{base}-{i}" for base in "ab" for i in range(4)]
    assert set(result.best) == {"a", "b"} and {r["steps"] for r in result.results} == {1, 2}
    plot(result.results, tmp_path / "sweep.svg")
    drawn = (tmp_path / "sweep.svg").read_text()
    assert drawn.count("<svg") == 1 and len(drawn) > 5000


def test_wrong_spaces_are_named_with_their_lines(write):
    text = (
        CONFIG.replace("hidden_size = 16\n", "")
        + """\
init = ["random", "vocabs"]
batch_sise = [1]
weight_decay = { low = 1, high = 0 }
warmup = { low = 0, high = 0.5 }
seed = []
task = ["causal_lm"]
"""
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), sweep=True)
    found = {p.split(": ")[0].rpartition(":")[2]: p.split(": ", 1)[1] for p in caught.value.problems}
    assert "did you mean batch_size?" in found["24"]
    assert "expected low < high" in found["25"] and "points is missing" in found["26"]
    assert "expected a list of values" in found["27"] and "task: unknown key" in found["28"]
    with pytest.raises(ConfigError) as caught:
        load_config(write("\n".join(text.splitlines()[:-5])), sweep=True)
    assert {p.split(": ")[1] for p in caught.value.problems} == {"sweep.space.init"}


def test_a_sweep_needs_its_table_and_scores(write):
    text = CONFIG.replace("hidden_size = 16\n", "")
    with pytest.raises(ConfigError, match=r"sweep\.candidates: a grid takes"):
        load_config(write(text), ["sweep.candidates=3"], sweep=True)
    with pytest.raises(ConfigError, match=r"sweep: missing"):
        load_config(write(text[: text.index("[sweep]")]), sweep=True)
    with pytest.raises(ConfigError, match="validation is missing"):
        load_config(write(text.replace(', validation = "train.jsonl"', "")), sweep=True)


def test_too_many_rungs_are_named_with_their_line(write, tmp_path):
    path = write(CONFIG.replace("hidden_size = 16\n", "").replace("rungs = 1", "rungs = 4"))
    with pytest.raises(ConfigError, match=r"sweep.toml:16: sweep\.rungs: rungs is 4 and eta 2, .* at least 16 steps"):
        sweep_file(path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_only_a_sweep_completes_is_not_trained_as_it_is(write):
    text = CONFIG.replace("hidden_size = 16\n", "")
    with pytest.raises(ConfigError, match=r"prompt\[0\].method: missing"):
        load_config(write(text))
