"""Language modelling and generation: rows, losses, greedy answers in mixed batches, encoder-decoders, problems."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from task_tools import batch_of, by_item, context, output, problems, rows
from torch.nn.functional import cross_entropy

from fastprompt import PrefixTuning, PromptedModel, PromptTuning, PTuningV2, demo
from fastprompt.errors import ArgumentError
from fastprompt.training.tasks import CausalLM, Generation, Seq2SeqLM
from fastprompt.training.tasks.base import IGNORED

TOKENIZER = demo.tokenizer()
EOS = TOKENIZER.eos_token_id
EXAMPLES = [{"text": "the capital of fistan is", "target": " gamouth"}, {"text": "owl =", "target": " owls"}]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    prompted = PromptedModel(demo.backbone(), TOKENIZER)
    prompted.add_prompt("a", PromptTuning(num_virtual_tokens=3, init="random"), seed=0)
    prompted.add_prompt("b", PrefixTuning(num_virtual_tokens=5), seed=1)
    prompted.add_prompt("c", PTuningV2(num_virtual_tokens=2), seed=2)
    return prompted


def test_only_the_target_and_the_end_are_labelled(model):
    (item,) = CausalLM().items(rows(EXAMPLES[:1]), context(TOKENIZER, model.backbone))
    given, wanted = ids("the capital of fistan is"), [*ids(" gamouth"), EOS]
    assert item.rows[0].input_ids == given + wanted
    assert item.rows[0].labels == [IGNORED] * len(given) + wanted
    assert CausalLM().count(item) == len(wanted)


def test_an_empty_text_begins_with_a_special_token(model):
    (item,) = CausalLM().items(rows([{"text": "", "target": "a"}]), context(TOKENIZER, model.backbone))
    assert item.rows[0].input_ids == [TOKENIZER.bos_token_id, *ids("a"), EOS]
    assert item.rows[0].labels[0] == IGNORED


class Framed:
    """A tokenizer that puts a token before and one behind every text, as some causal models' do."""

    eos_token_id, bos_token_id = 9, 8

    def __call__(self, text, add_special_tokens=True):
        plain = [ord(c) % 7 for c in text]
        return {"input_ids": [8, *plain, 9] if add_special_tokens else plain}


def test_a_closing_special_token_does_not_stand_between_text_and_target(model):
    (item,) = CausalLM().items(rows([{"text": "ab", "target": "c"}]), context(Framed(), model.backbone))
    assert item.rows[0].input_ids == [8, ord("a") % 7, 0, ord("c") % 7, 9]


@pytest.mark.parametrize("side", ["start", "end"])
def test_long_texts_lose_tokens_only_when_asked(model, side):
    given = context(TOKENIZER, model.backbone, prompt_length=2, max_length=6)
    (said,) = problems(CausalLM(), EXAMPLES[:1], given)
    assert said.startswith("example 0: 7 tokens need 7 positions, and the backbone has 6 beside a prompt of 2")
    items, found = CausalLM(truncate=side).prepare(rows(EXAMPLES[:1]), given)
    assert found == []
    text, wanted = ids(EXAMPLES[0]["text"]), [*ids(EXAMPLES[0]["target"]), EOS]
    room = 6 - len(wanted)
    assert items[0].rows[0].input_ids == (text[-room:] if side == "start" else text[:room]) + wanted
    (said,) = problems(CausalLM(truncate=side), [{"text": "owl", "target": " owls" * 9}], given)
    assert "its target leaves no room" in said


def test_generation_needs_room_for_its_answers(model):
    given = context(TOKENIZER, model.backbone, max_length=20)
    assert problems(Generation(max_new_tokens=8), EXAMPLES, given) == []
    text = ids(EXAMPLES[0]["text"])
    (said,) = problems(Generation(max_new_tokens=18), EXAMPLES[:1], given)
    assert said.startswith(f"example 0: 7 tokens need {len(text) + 18} positions, and the backbone has 20")
    items, found = Generation(max_new_tokens=18, truncate="end").prepare(rows(EXAMPLES[:1]), given)
    assert found == []
    assert items[0].rows[0].labels.count(IGNORED) == 2


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"text": "a", "target": ""}, "target is empty"),
        ({"text": "a", "target": None}, "target is None"),
        ({"text": None, "target": "a"}, "text is None"),
    ],
)
def test_problems_of_an_example_name_it(model, example, said):
    (found,) = problems(CausalLM(), [example], context(TOKENIZER, model.backbone))
    assert found.startswith(f"example 0: {said}")


def test_problems_of_the_setup(model, monkeypatch):
    given = context(SimpleNamespace(eos_token_id=None), model.backbone)
    assert "no eos token" in problems(CausalLM(), EXAMPLES, given)[0]
    masked = replace(context(TOKENIZER, model.backbone), template=SimpleNamespace(has_mask=True, columns=("text",)))
    assert problems(CausalLM(), EXAMPLES, masked) == [
        "causal_lm takes a template without [MASK]: the target follows the text"
    ]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    (said,) = problems(Generation(bleu=True), EXAMPLES, context(TOKENIZER, model.backbone))
    assert "sacrebleu" in said and "pip install 'fastprompt[train]'" in said
    for wrong in (dict(truncate="left"), dict(max_new_tokens=0), dict(beams=0)):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Generation(**wrong)


def test_losses_are_sums_over_the_target(model):
    task = CausalLM()
    items = task.items(rows(EXAMPLES), context(TOKENIZER, model.backbone))
    batch = batch_of(items, width=14)
    logits = torch.randn(2, 14, len(TOKENIZER), requires_grad=True)
    losses = task.losses(output(logits=logits), batch)
    for r, item in enumerate(items):
        labels = torch.tensor(item.rows[0].labels)
        expected = cross_entropy(logits[r, : len(labels) - 1], labels[1:], reduction="sum", ignore_index=IGNORED)
        torch.testing.assert_close(losses[r], expected)
    losses.sum().backward()
    assert logits.grad[0, len(items[0].rows[0].input_ids) - 1 :].eq(0).all()


def test_likelihood_scores(model):
    task = CausalLM()
    data = rows(EXAMPLES)
    items = task.items(data, context(TOKENIZER, model.backbone))
    batch = batch_of(items)
    labels = batch.padded_labels()
    logits = torch.zeros(*labels.shape, len(TOKENIZER))
    logits[:, :-1].scatter_(2, labels[:, 1:].clamp(min=0)[..., None], 4.0)
    first = (labels[1] != IGNORED).nonzero()[0, 0]
    logits[1, first - 1] = 0
    logits[1, first - 1, 3] = 4.0  # one token of the second target is missed
    scores = task.score(by_item(task.predict(None, output(logits=logits), batch), batch), data, items)
    count = sum(map(task.count, items))
    assert scores["sequence_accuracy"] == 0.5
    assert scores["token_accuracy"] == pytest.approx((count - 1) / count)
    losses = task.losses(output(logits=logits), batch)
    assert scores["log_likelihood"] == pytest.approx(-float(losses.sum()) / count)


def test_greedy_answers_of_a_mixed_batch_are_those_of_each_prompt_alone(model):
    task = Generation(max_new_tokens=7)
    data = rows(
        [{"text": text, "target": " a"} for text in ("owl =", "the capital of fistan is", "68 in words is", "a")]
    )
    items = task.items(data, context(TOKENIZER, model.backbone))
    names = ["a", "b", None, "c"]
    together = task.predict(model, None, batch_of(items, TOKENIZER.pad_token_id, prompts=names))
    for item, name, row in zip(items, names, together, strict=True):
        (alone,) = task.predict(model, None, batch_of([item], prompts=[name]))
        assert alone[0] == row[0]
        assert alone[1] == pytest.approx(row[1], rel=1e-4)
        text = TOKENIZER(data[item.example]["text"], return_tensors="pt")
        tokens = model.generate(
            **text, prompts=[name], max_new_tokens=7, do_sample=False, pad_token_id=TOKENIZER.pad_token_id
        )
        assert TOKENIZER.decode(tokens[0, text.input_ids.shape[1] :], skip_special_tokens=True) == row[0]


def test_generation_agrees_with_one_forward_about_exact_targets(model):
    task = Generation(max_new_tokens=12, bleu=False)
    known = next(t for t in demo.tasks(["plural"]))
    data = rows([{"text": known.written(x), "target": y} for x, y in known.train[:24]])
    items = task.items(data, context(TOKENIZER, model.backbone))
    batch = batch_of(items, TOKENIZER.pad_token_id, prompts=[None] * len(items))
    predictions = by_item(task.predict(model, None, batch), batch)
    scores = task.score(predictions, data, items)
    assert scores["exact_match"] == pytest.approx(scores["sequence_accuracy"])
    forward = model(batch.input_ids, batch.attention_mask)
    alone = CausalLM().score(by_item(CausalLM().predict(None, forward, batch), batch), data, items)
    assert alone == {name: pytest.approx(scores[name]) for name in alone}


def t5():
    config = tf.T5Config(
        vocab_size=len(TOKENIZER), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=2,
        pad_token_id=TOKENIZER.pad_token_id, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.T5ForConditionalGeneration(config).eval()


def test_an_encoder_decoder():
    prompted = PromptedModel(t5(), TOKENIZER)
    prompted.add_prompt("a", PromptTuning(num_virtual_tokens=3, init="random"), seed=0)
    prompted.add_prompt("b", PrefixTuning(num_virtual_tokens=5), seed=1)
    task = Seq2SeqLM(max_new_tokens=4)
    data = rows(EXAMPLES)
    items = task.items(data, context(TOKENIZER, prompted.backbone))
    row = items[0].rows[0]
    assert row.input_ids == ids(EXAMPLES[0]["text"])
    assert row.labels == ids(" gamouth")
    assert row.decoder_input_ids == [2, *ids(" gamouth")[:-1]]
    assert task.count(items[0]) == len(row.labels)
    batch = batch_of(items, TOKENIZER.pad_token_id, prompts=["a", "b"])
    forward = task._forward(prompted, batch)
    losses = task.losses(forward, batch)
    for r, (item, name) in enumerate(zip(items, ("a", "b"), strict=True)):
        alone = item.rows[0]
        expected = prompted(
            torch.tensor([alone.input_ids]), labels=torch.tensor([alone.labels]), prompts=name
        ).loss * len(alone.labels)
        torch.testing.assert_close(losses[r], expected, rtol=1e-4, atol=1e-5)
    predictions = by_item(task.predict(prompted, None, batch), batch)
    assert set(task.score(predictions, data, items)) == {
        "exact_match", "log_likelihood", "token_accuracy", "sequence_accuracy"
    }  # fmt: skip
    said = prompted.generate(**task._given(prompted, batch), prompts=["a", "b"], max_new_tokens=4, do_sample=False)
    assert [p[0][0] for p in predictions] == TOKENIZER.batch_decode(said, skip_special_tokens=True)


def test_an_encoder_decoder_without_a_start_token_is_a_problem():
    assert problems(Seq2SeqLM(), EXAMPLES, context(TOKENIZER)) == [
        "the backbone's config has no decoder_start_token_id, where every target begins: set it"
    ]
