"""Token classification: which sub-words carry a tag, windows of padding, entities and problems."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from task_tools import batch_of, bert, bert_tokenizer, by_item, context, output, problems, rows
from torch.nn.functional import cross_entropy

from fastprompt import PromptedModel, PTuningV2
from fastprompt.training.tasks import TokenClassification
from fastprompt.training.tasks.base import IGNORED

TOKENIZER = bert_tokenizer()
TAGS = ("O", "B-city", "I-city")
TASK = TokenClassification(classes=TAGS)
EXAMPLE = {"tokens": ["jim", "flew", "to", "new", "york", "playing"], "tags": ["O", "O", "O", "B-city", "I-city", "O"]}


def test_only_the_first_sub_word_is_labelled():
    (item,) = TASK.items(rows([EXAMPLE]), context(TOKENIZER))
    (row,) = item.rows
    tokens = TOKENIZER.convert_ids_to_tokens(row.input_ids)
    assert tokens == ["[CLS]", "jim", "flew", "to", "new", "york", "play", "##ing", "[SEP]"]
    assert row.labels == [IGNORED, 0, 0, 0, 1, 2, 0, IGNORED, IGNORED]
    assert TASK.count(item) == 6


def test_repeated_words_are_told_apart():
    (item,) = TASK.items(rows([{"tokens": ["cats", "cats"], "tags": [0, 1]}]), context(TOKENIZER))
    assert item.rows[0].labels == [IGNORED, 0, IGNORED, 1, IGNORED, IGNORED]


def test_losses_are_sums_over_the_rows_tags_and_predictions_one_a_word():
    examples = rows([EXAMPLE, {"tokens": ["paris", "was", "great"], "tags": ["B-city", "O", "O"]}])
    items = TASK.items(examples, context(TOKENIZER))
    batch = batch_of(items, width=13)
    logits = torch.randn(2, 13, 5, requires_grad=True)
    losses = TASK.losses(output(logits=logits), batch)
    for r, item in enumerate(items):
        labels = torch.tensor(item.rows[0].labels)
        expected = cross_entropy(logits[r, : len(labels), :3], labels, reduction="sum", ignore_index=IGNORED)
        torch.testing.assert_close(losses[r], expected)
    predictions = TASK.predict(None, output(logits=logits), batch)
    assert [len(p) for p in predictions] == [6, 3]
    best = logits[0, :, :3].argmax(-1)
    assert predictions[0] == [int(best[i]) for i in (1, 2, 3, 4, 5, 6)]


def test_scores_are_of_entities():
    examples = rows([EXAMPLE, {"tokens": ["paris", "was"], "tags": ["B-city", "O"]}])
    items = TASK.items(examples, context(TOKENIZER))
    right = [[[0, 0, 0, 1, 2, 0]], [[1, 0]]]
    assert TASK.score(right, examples, items)["f1"] == 1.0
    half = [[[0, 0, 0, 1, 0, 0]], [[1, 0]]]
    assert TASK.score(half, examples, items)["f1"] == 0.5


def test_words_that_were_cut_off_count_as_outside():
    limited = context(TOKENIZER, max_length=6)
    assert problems(TASK, [EXAMPLE], limited)[0].startswith(
        "example 0: 9 tokens need 9 positions, and the backbone has 6"
    )
    task = TokenClassification(classes=TAGS, truncate="end")
    examples = rows([EXAMPLE])
    items, found = task.prepare(examples, limited)
    assert found == []
    assert TOKENIZER.convert_ids_to_tokens(items[0].rows[0].input_ids) == ["[CLS]", "jim", "flew", "to", "new", "[SEP]"]
    batch = batch_of(items)
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 0, 0, 1, 0]]), 3).float()
    scores = task.score(by_item(task.predict(None, output(logits=logits), batch), batch), examples, items)
    assert scores["accuracy"] == pytest.approx(5 / 6)  # "york" is outside
    assert problems(task, [EXAMPLE], context(TOKENIZER, max_length=2)) == [
        "example 0: 2 tokens leave no room for its first word"
    ]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "it has 2 tokens and 1 tags"),
        ({"tokens": ["a", " ", "b"], "tags": ["O", "O", "O"]}, "word 1, ' ', has no tokens"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "word 1, '', has no tokens"),
        ({"tokens": ["a"], "tags": ["B-person"]}, "tags is 'B-person', expected one of the 3 classes"),
        ({"tokens": ["a"], "tags": [3]}, "tags is 3, expected 0 to 2"),
        ({"tokens": [], "tags": []}, "tokens is [], expected a list of words"),
        ({"tokens": "a b", "tags": ["O"]}, "tokens is 'a b', expected a list of words"),
        ({"tokens": ["a"], "tags": "O"}, "tags is 'O', expected a list"),
    ],
)
def test_problems_of_an_example_name_it(example, said):
    (found,) = problems(TASK, [example], context(TOKENIZER))
    assert found.startswith(f"example 0: {said}")


@pytest.mark.parametrize("prefix", [True, False])
def test_words_of_byte_level_tokenizers_begin_with_a_space(prefix):
    vocabulary = {"a": 0, "Ġ": 1, "Ġa": 2, "b": 3, "Ġb": 4, "<e>": 5}
    tokenizer = tf.GPT2Tokenizer(
        vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b")], unk_token="<e>", add_prefix_space=prefix
    )
    (item,) = TASK.items(rows([{"tokens": ["a", "b", "a"], "tags": [0, 1, 2]}]), context(tokenizer))
    assert item.rows[0].input_ids == [2 if prefix else 0, 4, 2]
    assert item.rows[0].labels == [0, 1, 2]


def test_slow_tokenizers_are_refused():
    slow = SimpleNamespace(is_fast=False)
    assert problems(TASK, [EXAMPLE], context(slow)) == [
        "token_classification needs a fast tokenizer, which knows the words of its tokens"
    ]


def test_tags_learn_in_a_mixed_batch():
    model = PromptedModel(bert("TokenClassification"))
    two = TokenClassification(classes=("O", "B-x"))
    model.add_prompt("three", PTuningV2(num_virtual_tokens=2), num_labels=3, seed=0)
    model.add_prompt("two", PTuningV2(num_virtual_tokens=5), num_labels=2, seed=0)
    given = context(TOKENIZER, model.backbone)
    items = TASK.items(rows([EXAMPLE]), given)
    items += two.items(rows([{"tokens": ["a", "mat"], "tags": ["O", "B-x"]}]), given)
    batch = batch_of(items, prompts=["three", "two"])
    logits = model(batch.input_ids, batch.attention_mask, prompts=list(batch.prompts)).logits
    for r, (name, task) in enumerate((("three", TASK), ("two", two))):
        alone = batch_of(items[r : r + 1], prompts=[name])
        expected = task.losses(output(logits=model(alone.input_ids, alone.attention_mask, prompts=name).logits), alone)
        cut = batch_of(items[r : r + 1], prompts=[name], width=batch.input_ids.shape[1])
        torch.testing.assert_close(task.losses(output(logits=logits[r : r + 1]), cut), expected)


def test_a_package_that_scores_need_is_missed_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval", None)
    (said,) = problems(TASK, [EXAMPLE], context(TOKENIZER))
    assert said == "token_classification needs seqeval, which is not installed: pip install 'fastprompt[train]'"
