"""Tokens that a tokenizer has and the backbone has no embedding for: padding never reaches it, others are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_cases as cases
import zoo

import fastprompt as fp
from fastprompt import demo
from fastprompt.errors import ConfigError, TrainingError
from fastprompt.training import Job
from fastprompt.training.config import load_config
from fastprompt.training.data import load
from fastprompt.training.launch import prepare_launch
from fastprompt.training.padding import pad_token_id
from fastprompt.training.tasks import Generation


def tokenizer_with_a_pad_of_its_own() -> Any:
    tokenizer = demo.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    return tokenizer


def test_a_padding_token_that_the_backbone_lacks_is_not_used() -> None:
    tokenizer, backbone = tokenizer_with_a_pad_of_its_own(), demo.backbone()
    count = backbone.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id >= count
    backbone.config.pad_token_id = None
    model = fp.PromptedModel(backbone, tokenizer)
    assert 0 <= pad_token_id(model) < count
    rows = [{"text": x, "target": y} for x, y in demo.tasks(["capital"])[0].train[:5]]
    rows[0]["text"] = "a far longer one than all others " + rows[0]["text"]
    job = Job(
        name="padded",
        task=Generation(max_new_tokens=4),
        train=load(rows),
        validation=load(rows),
        config=fp.PrefixTuning(num_virtual_tokens=2),
        batch_size=5,
        steps=1,
    )
    scores = [fp.train(model, [job]).jobs["padded"].scores]
    other = fp.PromptedModel(demo.backbone(), demo.tokenizer())
    scores.append(fp.train(other, [job]).jobs["padded"].scores)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    torch.testing.assert_close(model.library["padded"].weights(), other.library["padded"].weights())


@pytest.mark.parametrize("own", [None, 3, 500])
@pytest.mark.parametrize("named", [None, 5, 500])
def test_rows_are_padded_with_a_token_that_there_is(own: int | None, named: int | None) -> None:
    backbone = zoo.causal("llama")
    backbone.config.pad_token_id = own
    found = pad_token_id(SimpleNamespace(backbone=backbone, tokenizer=SimpleNamespace(pad_token_id=named)))
    assert found == next((pad for pad in (own, named) if pad in (3, 5)), 0)


def test_a_decoder_that_classifies_needs_a_padding_token_of_its_own() -> None:
    model = fp.PromptedModel(zoo.causal_classifier(pad_token_id=None), SimpleNamespace(pad_token_id=0))
    model.backbone.config.pad_token_id = zoo.VOCAB
    with pytest.raises(TrainingError, match=f"pad_token_id {zoo.VOCAB}.* embeddings for tokens below {zoo.VOCAB}"):
        fp.train(model, [cases.job("prefix_tuning", task=cases.Classify())], options=cases.CPU)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_other_tokens_that_the_backbone_lacks_are_problems(part: str) -> None:
    rows = cases.texts(4, 0)
    rows[2]["ids"][1] = zoo.VOCAB
    job = cases.job("p_tuning", **{part: rows})
    with pytest.raises(
        TrainingError, match=f"{part}: example 2: it has token 97, and the backbone embeddings"
    ) as caught:
        fp.train(cases.causal(), [job], options=cases.CPU)
    assert len(caught.value.problems) == 1


def test_a_config_gives_the_tokenizer_a_padding_token_that_there_is(tmp_path: Any) -> None:
    tokenizer_with_a_pad_of_its_own().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "target": " b"}\n')
    (tmp_path / "run.toml").write_text("""\
[run]
backbone = "embedded"
tokenizer = "./tokenizer"
[[prompt]]
name = "a"
method = "prompt_tuning"
num_virtual_tokens = 1
steps = 1
task.type = "causal_lm"
data.train = "rows.jsonl"
""")
    try:
        model = prepare_launch(load_config(tmp_path / "run.toml")).model
    except ConfigError as error:
        pytest.fail(str(error))
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
