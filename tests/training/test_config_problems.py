"""Config files: every problem of one comes at once, with its line and key."""

from __future__ import annotations

from functools import partial

import pytest
from config_cases import GOOD, problems_of, written

from fastprompt.errors import ConfigError
from fastprompt.training.config import load_config
from fastprompt.training.launch import check_launch, prepare_launch


@pytest.fixture
def write(tmp_path):
    return partial(written, tmp_path)


@pytest.fixture
def problems(write):
    """The problems of a config, as (line, key, message)."""
    return lambda text, *overrides: problems_of(write(text), *overrides)


def test_every_problem_comes_at_once(problems):
    text = """\
[run]
backbone = 3
sed = 1
dtype = "float23"
accumulation = 0

[defaults]
learning_rate = -1.0
reparameterization = "mpl"
epohcs = 3
name = "all"

[[prompt]]
name = "a"
method = "p_tuning_v2"
num_virtual_tokens = 0
dropout = 1.5
layers = [0, "x"]
[prompt.task]
type = "sequence_clasification"
[prompt.data]
train = "a.jsonl"

[[prompt]]
name = "a"
method = "prompt_tuning"
reparameterization = "mlp"
steps = 3
epochs = 4
warmup = 1.5
seed = true
[prompt.task]
type = "causal_lm"
txt = 1
[prompt.data]
trian = "a.jsonl"

[[prompt]]
name = "../c"
shares = "b"
method = "p_tuning"
schedule = "cosin"
task.type = "causal_lm"
data.train = ["a", 3]

[[comparator]]
kind = "ful"
prompts = ["z"]

[swep]
"""
    found = problems(text)
    lines = text.splitlines()
    expected = {
        (2, "run.backbone"): "3 came, expected a string",
        (3, "run.sed"): "unknown key; did you mean seed?",
        (
            4,
            "run.dtype",
        ): "\"float23\" came, expected 'float32', 'bfloat16' or 'float16'; did you mean float32 or float16?",
        (5, "run.accumulation"): "0 came, expected a number greater than or equal to 1",
        (8, "defaults.learning_rate"): "-1.0 came, expected a number greater than or equal to 0",
        (9, "defaults.reparameterization"): "'mpl'",
        (10, "defaults.epohcs"): "did you mean epochs?",
        (11, "defaults.name"): "a name belongs to one prompt",
        (16, "prompt[0].num_virtual_tokens"): "num_virtual_tokens is 0, expected an int >= 1",
        (17, "prompt[0].dropout"): "dropout is 1.5",
        (18, "prompt[0].layers[1]"): '"x" came, expected an integer',
        (20, "prompt[0].task.type"): "did you mean sequence_classification",
        (13, "prompt[0].epochs"): "expected either epochs or steps",
        (24, "prompt[1].num_virtual_tokens"): "missing: prompt_tuning needs it",
        (25, "prompt[1].name"): "the name of an earlier prompt",
        (27, "prompt[1].reparameterization"): "prompt_tuning has no such key, prefix_tuning and p_tuning_v2 have",
        (28, "prompt[1].steps"): "epochs and steps came",
        (30, "prompt[1].warmup"): "1.5 came, expected an integer or a number less than 1",
        (31, "prompt[1].seed"): "true came, expected an integer",
        (34, "prompt[1].task.txt"): "unknown key",
        (35, "prompt[1].data.train"): "missing",
        (36, "prompt[1].data.trian"): "did you mean train?",
        (39, "prompt[2].name"): "cannot name a prompt folder",
        (40, "prompt[2].shares"): '"b" came, expected a prompt with virtual tokens of its own: a',
        (41, "prompt[2].method"): "leave it out",
        (42, "prompt[2].schedule"): "did you mean cosine?",
        (38, "prompt[2].epochs"): "expected either epochs or steps",
        (44, "prompt[2].data.train[1]"): "3 came, expected a string",
        (47, "comparator[0].kind"): "did you mean full?",
        (48, "comparator[0].prompts"): 'no prompt "z"',
        (50, "swep"): "did you mean sweep?",
    }
    by_place = {(line, key): message for line, key, message in found}
    assert set(expected) - set(by_place) == set()
    for place, message in expected.items():
        assert message in by_place[place], place
    # nothing besides, but for a second word on a value of the wrong kind in a union or one that has to follow
    extra = {key for line, key in set(by_place) - set(expected)}
    assert extra <= {"prompt[2].data.train"}
    for line, key, _ in found:
        name = key.rpartition(".")[2].partition("[")[0]
        assert name in lines[line - 1] or lines[line - 1].startswith("["), (line, key)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[run]\nbackbone = \n", 2, "not TOML"),
        ("[run]\nx = 1\nx = 2\n", 3, "not TOML"),
        ("[run", 1, "not TOML"),
    ],
)
def test_syntax_errors_have_a_line(write, text, line, message):
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"[run]\n# \xe9\n")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "text", ["", "prompt = 3", "[prompt]\nname = 'a'", "prompt = [1, 2]", "run = 1\ndefaults = []"]
)
def test_tables_of_other_kinds_are_refused(problems, text):
    found = {key: message for _, key, message in problems(text)} if text else None
    if found is None:
        return
    assert "prompt" in found or "expected a table" in found["run"]


def test_an_empty_file_says_what_is_missing(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write(""))
    assert [p.split(": ", 1)[1] for p in caught.value.problems] == [
        "run: missing: expected a table [run]",
        "the file: there is no [[prompt]]: expected at least one",
    ]


def test_wrong_overrides_are_named(write):
    path = write(GOOD)
    for option, message in {
        "seed": "expected key=value",
        "a b=1": "expected key=value",
        "prompt.none.steps=1": "a number below 3 or deep, soft, second",
        "prompt=1": "double brackets",
        "prompt.steps=1": "say which prompt",
        "run.seed.x=1": "seed is a value",
        "run.seed=x": '"x" came, expected an integer',
        "run.sed=1": "did you mean seed?",
    }.items():
        with pytest.raises(ConfigError, match=f"^--set {option}") as caught:
            load_config(path, [option])
        assert message in str(caught.value)


def test_one_run_needs_one_class_of_backbone(problems):
    text = GOOD.replace('task.classes = ["a", "b", "c"]', 'task = { type = "causal_lm" }')
    ((line, key, message),) = problems(text)
    assert (line, key) == (32, "prompt[1].task.type")
    assert "AutoModelForCausalLM" in message and "AutoModelForSequenceClassification" in message


def test_data_and_backbone_that_cannot_be_loaded_are_named(write):
    path = write(GOOD.replace("validation.jsonl", "absent.jsonl"))
    with pytest.raises(ConfigError) as caught:
        prepare_launch(load_config(path))
    assert [p.split(": ")[:2] for p in caught.value.problems] == [[f"{path}:16", "defaults.data.validation"]]
    path = write(GOOD.replace("embedded", "./absent"))
    with pytest.raises(ConfigError, match=r"run\.backbone: transformers cannot load it"):
        prepare_launch(load_config(path))


def test_problems_of_examples_come_with_the_line_of_their_data(write):
    path = write(GOOD.replace('["a", "b", "c"]', '["good", "fine"]'))
    with pytest.raises(ConfigError) as caught:
        check_launch(prepare_launch(load_config(path)))
    places = {tuple(p.split(": ")[:2]) for p in caught.value.problems}
    assert (f"{path}:15", "defaults.data.train") in places
    assert all("bad" in p for p in caught.value.problems)
