"""Extractive QA: windows and their labels, padding-free losses, best spans over windows, problems."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from task_tools import batch_of, bert, bert_tokenizer, by_item, context, output, problems, rows
from tokenizers import normalizers
from torch.nn.functional import log_softmax

from fastprompt import PromptedModel, PromptTuning, PTuningV2
from fastprompt.errors import ArgumentError
from fastprompt.training.tasks import QuestionAnswering
from fastprompt.training.tasks.qa import Spans

TOKENIZER = bert_tokenizer()
TEXT = "the cat sat on the red mat in paris and the dog flew to new york"


def example(answer, text=TEXT, question="where was the cat ?"):
    return {
        "question": question, "context": text, "answers": {"text": [answer], "answer_start": [text.index(answer)]}
    }  # fmt: skip


def words(row, first, last):
    return TOKENIZER.decode(row.input_ids[first : last + 1])


def test_labels_are_the_answers_tokens():
    (item,) = QuestionAnswering().items(rows([example("red mat")]), context(TOKENIZER))
    (row,) = item.rows
    assert words(row, row.labels.start, row.labels.end) == "red mat"
    assert row.labels.null == 0
    assert row.token_type_ids[row.labels.first] == 1
    a, b = (
        row.labels.offsets[row.labels.start - row.labels.first],
        row.labels.offsets[row.labels.end - row.labels.first],
    )
    assert TEXT[a[0] : b[1]] == "red mat"


def test_an_answer_inside_a_token_takes_the_token():
    (item,) = QuestionAnswering().items(rows([example("ed ma")]), context(TOKENIZER))
    labels = item.rows[0].labels
    assert words(item.rows[0], labels.start, labels.end) == "red mat"


@pytest.mark.parametrize("stride", [0, 2, 4])
def test_windows_share_the_stride_and_cover_everything(stride):
    task = QuestionAnswering(window=16, stride=stride)
    (item,) = task.items(rows([example("red mat")]), context(TOKENIZER))
    spans = [(row.labels.offsets[0][0], row.labels.offsets[-1][1]) for row in item.rows]
    assert len(item.rows) > 1
    assert all(len(row.input_ids) <= 16 for row in item.rows)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(TEXT)
    for (_, stop), (start, _) in pairwise(spans):
        assert len(TEXT[start:stop].split()) == stride
    for row in item.rows:
        inside = row.labels.offsets[0][0] <= TEXT.index("red") and TEXT.index("mat") + 3 <= row.labels.offsets[-1][1]
        assert ((row.labels.start, row.labels.end) != (0, 0)) == inside
    assert task.count(item) == len(item.rows)


def test_windows_keep_within_the_backbones_positions():
    items = QuestionAnswering(stride=2).items(rows([example("red mat")]), context(TOKENIZER, max_length=14))
    assert max(len(row.input_ids) for row in items[0].rows) == 14


def test_the_loss_does_not_see_padding():
    task = QuestionAnswering()
    items = task.items(rows([example("red mat"), example("dog", text="a dog")]), context(TOKENIZER))
    batch = batch_of(items, width=40)
    start, end = torch.randn(2, 40), torch.randn(2, 40)
    start[1, len(items[1].rows[0].input_ids) :] = 50.0  # what padding says must not matter
    losses = task.losses(output(start_logits=start, end_logits=end), batch)
    for r, item in enumerate(items):
        row, n = item.rows[0], len(item.rows[0].input_ids)
        expected = log_softmax(start[r, :n], 0)[row.labels.start] + log_softmax(end[r, :n], 0)[row.labels.end]
        torch.testing.assert_close(losses[r], -expected / 2)


def brute(start, end, labels, longest):
    """Every allowed span, best first."""
    found = []
    for i in range(len(labels.offsets)):
        for j in range(i, min(i + longest, len(labels.offsets))):
            score = float(start[labels.first + i] + end[labels.first + j])
            found.append((score, labels.offsets[i][0], labels.offsets[j][1]))
    return sorted(found, key=lambda span: -span[0])


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_spans_are_the_best_of_all(longest):
    task = QuestionAnswering(max_answer=longest, n_best=5)
    items = task.items(rows([example("red mat")]), context(TOKENIZER))
    batch = batch_of(items, width=33)
    start, end = torch.randn(1, 33), torch.randn(1, 33)
    (spans,) = task.predict(None, output(start_logits=start, end_logits=end), batch)
    labels = items[0].rows[0].labels
    assert len(spans.best) == 5
    np.testing.assert_allclose(
        [s[0] for s in spans.best], [s[0] for s in brute(start[0], end[0], labels, longest)[:5]], rtol=1e-6
    )
    assert [s[1:] for s in spans.best] == [s[1:] for s in brute(start[0], end[0], labels, longest)[:5]]
    assert spans.null == pytest.approx(float(start[0, 0] + end[0, 0]))


def perfect(items, width):
    """Logits that point at every row's own labels."""
    held = [row.labels for item in items for row in item.rows]
    start, end = torch.zeros(len(held), width), torch.zeros(len(held), width)
    for r, labels in enumerate(held):
        start[r, labels.start] = end[r, labels.end] = 9.0
    return output(start_logits=start, end_logits=end)


def test_windows_are_merged_into_one_answer():
    task = QuestionAnswering(window=16, stride=4)
    data = rows([example("red mat"), example("new york", question="where to ?")])
    items = task.items(data, context(TOKENIZER))
    batch = batch_of(items, width=16)
    predictions = by_item(task.predict(None, perfect(items, 16), batch), batch)
    assert [task.answer(p, TEXT) for p in predictions] == ["red mat", "new york"]
    assert task.score(predictions, data, items) == {"exact_match": 1.0, "f1": 1.0}


def test_questions_without_answer():
    unanswered = example("red mat") | {"answers": {"text": [], "answer_start": []}}
    (said,) = problems(QuestionAnswering(), [unanswered, example("dog")], context(TOKENIZER))
    assert said == "example 0: it has no answers, which no_answer=True would allow"
    task = QuestionAnswering(no_answer=True)
    data = rows([unanswered, example("dog")])
    items = task.items(data, context(TOKENIZER))
    assert (items[0].rows[0].labels.start, items[0].rows[0].labels.end) == (0, 0)
    batch = batch_of(items, width=30)
    predictions = by_item(task.predict(None, perfect(items, 30), batch), batch)
    assert task.score(predictions, data, items) == {"exact_match": 1.0, "f1": 1.0}
    spans = Spans(null=5.0, best=((4.0, 0, 3),))
    assert task.answer([spans], TEXT) == ""
    assert QuestionAnswering().answer([spans], TEXT) == "the"


def test_answers_as_a_list_of_dicts():
    listed = {"question": "what ?", "context": "a cat", "answers": [{"text": "cat", "answer_start": 2}]}
    items, found = QuestionAnswering().prepare(rows([listed]), context(TOKENIZER))
    assert found == []
    assert words(items[0].rows[0], items[0].rows[0].labels.start, items[0].rows[0].labels.end) == "cat"


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (
            example("cat") | {"answers": {"text": ["cat"], "answer_start": [5]}},
            "the answer 'cat' is not at answer_start 5",
        ),
        (example("cat") | {"answers": None}, "answers is no {"),
        (example("cat") | {"answers": {"text": ["cat"]}}, "answers is no {"),
        (example("cat") | {"question": " "}, "question is empty"),
        (example("cat") | {"context": None}, "context is None"),
        (example("cat", question="what " * 40), "its question of 43 tokens and a stride of 8 leave no room"),
    ],
)
def test_problems_of_an_example_name_it(example, said):
    (found,) = problems(QuestionAnswering(window=32, stride=8), [example], context(TOKENIZER))
    assert found.startswith(f"example 0: {said}")


@pytest.mark.parametrize("wrong", [dict(window=2), dict(stride=400), dict(max_answer=0), dict(n_best=0)])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        QuestionAnswering(**wrong)


def test_rows_of_mixed_methods_have_the_losses_they_have_alone():
    model = PromptedModel(bert("QuestionAnswering"))
    task = QuestionAnswering(window=20, stride=4)
    model.add_prompt("embedded", PromptTuning(num_virtual_tokens=3, init="random"), num_labels=2, seed=0)
    model.add_prompt("prefix", PTuningV2(num_virtual_tokens=4), num_labels=2, seed=1)
    items = task.items(rows([example("dog", text="a dog"), example("red mat")]), context(TOKENIZER, model.backbone))
    names = ["embedded"] * len(items[0].rows) + ["prefix"] * len(items[1].rows)
    batch = batch_of(items, prompts=names)
    mixed = task.losses(model(batch.input_ids, batch.attention_mask, prompts=names), batch)
    alone = [
        batch_of([item], prompts=[name] * len(item.rows))
        for item, name in zip(items, ("embedded", "prefix"), strict=True)
    ]
    expected = [task.losses(model(b.input_ids, b.attention_mask, prompts=list(b.prompts)), b) for b in alone]
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_context_without_tokens_is_a_problem():
    nothing = {"question": "where ?", "context": "\N{ZERO WIDTH SPACE}", "answers": {"text": [], "answer_start": []}}
    task, tokenizer = QuestionAnswering(no_answer=True), bert_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    assert problems(task, [nothing], context(tokenizer)) == ["example 0: its context has no tokens"]
