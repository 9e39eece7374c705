"""`max_length`: texts that are too long are cut; targets and virtual tokens do not count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from task_tools import bert, bert_tokenizer, context, problems, rows

import fastprompt as fp
from fastprompt import demo
from fastprompt.training import Job, load_config
from fastprompt.training.items import make_items
from fastprompt.training.launch import check_launch, prepare_launch
from fastprompt.training.tasks import (
    CausalLM,
    Generation,
    MultipleChoice,
    Probing,
    QuestionAnswering,
    Seq2SeqLM,
    SequenceClassification,
    Task,
    TaskContext,
    TokenClassification,
    Verbalizer,
)
from fastprompt.training.tasks.base import IGNORED
from fastprompt.training.template import Template

BERT = bert_tokenizer()
CAUSAL = demo.tokenizer()
TEXT = "the plot was awful and it was not fine"


def bounded(tokenizer: Any, longest: int, model: Any = None, **changes: Any) -> TaskContext:
    return replace(context(tokenizer, model, **changes), longest_text=longest)


def encoded(task: Task, example: dict[str, Any], given: TaskContext) -> list[list[int]]:
    items, found = task.prepare(rows([example]), given)
    assert found == []
    return [row.input_ids for row in items[0].rows]


@pytest.mark.parametrize(
    ("truncate", "kept"), [(None, "the plot was"), ("end", "the plot was"), ("start", "was not fine")]
)
def test_a_text_is_cut_at_its_end_or_where_the_task_says(truncate: str | None, kept: str) -> None:
    task = SequenceClassification(classes=("a", "b"), truncate=truncate)
    example = {"text": TEXT, "label": "a"}
    assert encoded(task, example, bounded(BERT, 5)) == [BERT(kept)["input_ids"]]  # [CLS] and [SEP] count
    assert encoded(task, example, bounded(BERT, 50)) == [BERT(TEXT)["input_ids"]]
    both = bounded(BERT, 50, prompt_length=3, max_length=5)  # where the backbone has fewer positions they bound it
    assert encoded(task, example, both) == [BERT(kept)["input_ids"]]


def test_without_it_a_text_that_is_too_long_stays_a_problem() -> None:
    long = [{"text": TEXT, "label": "a"}]
    task = SequenceClassification(classes=("a", "b"))
    found = problems(task, long, context(BERT, prompt_length=4, max_length=5))
    assert found == [
        "example 0: 11 tokens need 11 positions, and the backbone has 5 beside a prompt of 4: shorten the text or the "
        'prompt or set truncate="end" or "start"'
    ]


@pytest.mark.parametrize("task", [CausalLM(), Generation(max_new_tokens=50)], ids=["causal_lm", "generation"])
def test_a_target_does_not_count(task: CausalLM) -> None:
    model = demo.backbone()
    ids = CAUSAL(TEXT, add_special_tokens=False)["input_ids"]
    wanted = [*CAUSAL(" a long target of many tokens", add_special_tokens=False)["input_ids"], CAUSAL.eos_token_id]
    example = {"text": TEXT, "target": " a long target of many tokens"}
    (row,) = task.items(rows([example]), bounded(CAUSAL, 3, model))[0].rows
    assert row.input_ids == ids[:3] + wanted and row.labels == [IGNORED] * 3 + wanted
    (row,) = replace(task, truncate="start").items(rows([example]), bounded(CAUSAL, 3, model))[0].rows
    assert row.input_ids == ids[-3:] + wanted


def test_virtual_tokens_in_place_do_not_count() -> None:
    given = replace(bounded(CAUSAL, 4, demo.backbone(), prompt_length=5), template=Template("{3} {text} {2}"))
    (row,) = encoded(CausalLM(), {"text": TEXT, "target": " a"}, given)
    target = len(CAUSAL(" a", add_special_tokens=False)["input_ids"]) + 1
    placed = [i for i in row if i < 0]
    assert len(placed) == 5 and 0 < len(row) - len(placed) - target <= 4


def test_every_task_keeps_to_it() -> None:
    long = " ".join([TEXT] * 4)
    words = {"good": "good", "bad": "bad"}
    for task, example in (
        (MultipleChoice(), {"text": long, "choices": ["a cat", "a dog"], "label": 0}),
        (TokenClassification(classes=("O", "B-x")), {"tokens": long.split(), "tags": ["O"] * len(long.split())}),
        (QuestionAnswering(window=30, stride=2), {"question": "what", "context": long, "answers": ANSWER}),
        (Verbalizer(words, "{text} it was [MASK]", masked=True), {"text": long, "label": "good"}),
        (Probing("{subject} [MASK]", masked=True), {"subject": long, "object": "good"}),
    ):
        found = encoded(task, example, bounded(BERT, 12))
        assert found and all(6 < len(ids) <= 12 for ids in found), task.name
    (row,) = encoded(
        Verbalizer(words, "{text} it was [MASK]", masked=True), {"text": long, "label": 0}, bounded(BERT, 9)
    )
    assert BERT.decode(row) == "[CLS] the plot was awful it was [MASK] [SEP]"  # the pattern stays whole


ANSWER = {"text": ["plot"], "answer_start": [4]}


def test_an_encoder_decoder_cuts_the_encoders_text_only() -> None:
    given = replace(bounded(BERT, 6), decoder_start_token_id=1)
    (row,) = Seq2SeqLM().encode({"text": TEXT, "target": TEXT}, given)
    assert len(row.input_ids) == 6 and len(row.decoder_input_ids) == len(BERT(TEXT)["input_ids"])


def test_a_bound_that_leaves_no_text_is_a_problem() -> None:
    example = [{"text": TEXT, "label": "a"}]
    found = problems(SequenceClassification(classes=("a", "b")), example, bounded(BERT, 2))
    assert found == ["example 0: 2 tokens leave no room for its text, which needs 3 at least"]


def test_a_job_and_a_config_file_have_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT * 200, "target": " a"}) + "\n")
    (tmp_path / "run.toml").write_text("""\
[run]
backbone = "embedded"
[defaults]
max_length = 7
steps = 1
num_virtual_tokens = 2
method = "prompt_tuning"
task.type = "causal_lm"
data.train = "rows.jsonl"
[[prompt]]
name = "cut"
[[prompt]]
name = "whole"
max_length = "none"
""")
    launch = prepare_launch(load_config(tmp_path / "run.toml"))
    cut, whole = launch.jobs
    assert (cut.max_length, whole.max_length) == (7, None)
    (train, _), found = make_items(launch.model, cut)
    assert found == [] and train[0].rows[0].labels.count(IGNORED) == 7
    with pytest.raises(fp.FastPromptError, match=r"run.toml:9: defaults.data.train: .*shorten the text") as caught:
        check_launch(launch)
    assert len(caught.value.problems) == 1
    wrong = Job(**(vars(cut) | {"max_length": 0}))
    assert "max_length is 0, expected an int >= 1" in wrong.problems()
    text = (tmp_path / "run.toml").read_text()
    (tmp_path / "run.toml").write_text(text.replace("max_length = 7", "max_length = 0"))
    with pytest.raises(fp.FastPromptError, match=r"run.toml:4: defaults\.max_length: 0 came"):
        load_config(tmp_path / "run.toml")


def test_training_cuts(tmp_path: Path) -> None:
    model = fp.PromptedModel(bert("SequenceClassification"), BERT)
    job = Job(
        name="cut",
        task=SequenceClassification(classes=("a", "b")),
        train=rows([{"text": " ".join([TEXT] * 20), "label": "a"}] * 2),
        config=fp.PTuningV2(num_virtual_tokens=2),
        steps=1,
        batch_size=2,
    )
    with pytest.raises(fp.FastPromptError, match="shorten the text"):
        fp.train(model, [job])
    assert fp.train(model, [replace(job, max_length=10)]).jobs["cut"].steps == 1
