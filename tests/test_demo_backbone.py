"""The embedded backbone: its files, its corpus, what it knows, its tasks and the script that makes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from random import Random

import pytest
import torch

from fastprompt import demo
from fastprompt.demo import corpus, pretrain
from fastprompt.demo.tasks import TRAINING, exact_match

CORPUS_DIGEST = "f95d1e1a49791991"
SIZE_LIMIT = 8 * 2**20
SKILL_FLOOR, MEAN_FLOOR = 0.75, 0.93  # on 16 subjects a skill; over 64 the record has 0.89 at least, 0.98 on average


@pytest.fixture(scope="module")
def backbone():
    return demo.backbone()


@pytest.fixture(scope="module")
def tokenizer():
    return demo.tokenizer()


@pytest.fixture(scope="module")
def record():
    return json.loads((demo.ASSETS / "record.json").read_text())


def test_assets_are_small_and_load_in_float32(backbone, tokenizer):
    assert sum(f.stat().st_size for f in demo.ASSETS.iterdir()) <= SIZE_LIMIT
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert backbone.config.num_attention_heads > backbone.config.num_key_value_heads > 1
    assert backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
    assert backbone.config.vocab_size == len(tokenizer)
    assert not backbone.training


def rows(tokenizer, pairs):
    """Ids `[B, S]` padded at the end, and labels that ask for the targets and the line's end."""
    texts = [(tokenizer(x).input_ids, [*tokenizer(y).input_ids, tokenizer.eos_token_id]) for x, y in pairs]
    ids = [torch.tensor(x + y) for x, y in texts]
    labels = [torch.tensor([-100] * len(x) + y) for x, y in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


def prompted_logits(backbone, virtual, ids):
    """Logits `[B, S, vocabulary]` with the embeddings `virtual` `[P, E]` in front; the padding at the end is unseen."""
    inputs = torch.cat([virtual.expand(len(ids), -1, -1), backbone.get_input_embeddings()(ids)], dim=1)
    return backbone(inputs_embeds=inputs).logits[:, len(virtual) :]


def trained_score(backbone, tokenizer, task, training):
    """Exact match on `test` of a prompt trained on `train` by plain prompt tuning; the greedy answer is the argmax."""
    rng, embeddings = Random(0), backbone.get_input_embeddings().weight
    virtual = embeddings[rng.sample(range(3, len(embeddings)), training.virtual_tokens)].clone().detach()
    optimizer = torch.optim.AdamW([virtual.requires_grad_()], lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, training.steps)
    for _ in range(training.steps):
        ids, labels = rows(tokenizer, rng.sample(task.train, training.batch))
        logits = prompted_logits(backbone, virtual, ids)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        (virtual.grad,) = torch.autograd.grad(loss, virtual)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ids, labels = rows(tokenizer, task.test)
        right = prompted_logits(backbone, virtual, ids)[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == -100)).all(1).float().mean().item()


@pytest.mark.parametrize("text", ["gola = bakton\nmira ->", "Ünïcode \t 漢字 12345\n\n", " a  b", ""])
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_marks_line_ends_and_pads_left(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("a\nb").input_ids.count(tokenizer.eos_token_id) == 1
    batch = tokenizer(["a", "a b c"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.pad_token_id and batch.attention_mask[0][-1] == 1


def test_corpus_is_the_same_everywhere():
    text = "".join(corpus.document(0, i) for i in range(300))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == CORPUS_DIGEST


def test_world_is_consistent():
    answers = {name: skill.answers for name, skill in corpus.SKILLS.items()}
    assert all(answers["homeland"][p] == answers["country"][c] for p, c in answers["city"].items())
    assert all(answers["country"][c] == state for state, c in answers["capital"].items())
    assert answers["plural"]["mouse"] == "mice" and answers["reverse"]["cat"] == "t a c"
    assert answers["words"]["100"] == "one hundred" and answers["roman"]["94"] == "x c i v"
    assert answers["difference"]["3 and 10"] == "seven"


def test_backbone_has_every_skill(backbone, tokenizer):
    scores = pretrain.skill_scores(backbone, tokenizer, 16)
    low = {name: score for name, score in scores.items() if score < SKILL_FLOOR}
    assert not low and sum(scores.values()) / len(scores) >= MEAN_FLOOR


def test_tasks_are_fixed_and_split():
    assert demo.tasks() == demo.tasks() and len(demo.tasks()) == 8
    for task in demo.tasks():
        train, test = {x for x, _ in task.train}, {x for x, _ in task.test}
        assert len(train) == len(task.train) >= 32 and len(test) == len(task.test) >= 24
        assert not train & test
        assert all(x.endswith(" =") and y.startswith(" ") for x, y in task.train + task.test)
    assert [t.name for t in demo.tasks(["job", "tone"])] == ["job", "tone"]


def test_reviews_of_tasks_are_new_to_the_backbone():
    seen = corpus.SKILLS["tone"].answers
    assert all(x.removesuffix(" =") not in seen for t in demo.tasks(["tone", "topic"]) for x, _ in t.train + t.test)


def test_hand_written_prompt_is_the_best_phrasing_on_train(record):
    for task in demo.tasks():
        scores = {text: on_train for text, (on_train, _) in record["tasks"][task.name]["phrasings"].items()}
        assert scores[task.hand_written] == max(scores.values()), task.name


def test_written_instructions_beat_the_bare_backbone(backbone, tokenizer):
    bare = written = 0.0
    for task in demo.tasks():
        pairs = task.test[:24]
        bare += exact_match(backbone, tokenizer, pairs)
        written += exact_match(backbone, tokenizer, [(task.written(x), y) for x, y in pairs])
    assert written > bare


def test_a_trained_prompt_beats_the_written_instruction(backbone, tokenizer):
    (task,) = demo.tasks(["job"])
    written = exact_match(backbone, tokenizer, [(task.written(x), y) for x, y in task.test])
    trained = trained_score(backbone, tokenizer, task, replace(TRAINING["prompt_tuning"], steps=60))
    assert trained >= written + 0.15


def test_pretraining_makes_the_same_folder_twice_and_replaces_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "exact_match", lambda model, tokenizer, pairs: float(len(pairs)))  # the slow part
    recipe = pretrain.Recipe(steps=2, batch=2, length=32, layers=1, scored=1)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "stale").touch()
    one, two = (pretrain.pretrain(recipe, tmp_path / name) for name in ("one", "two"))
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert {f.name for f in demo.ASSETS.iterdir()} == set(files["one"]) == set(files["two"])
    assert all(files["one"][name] == files["two"][name] for name in files["one"] if name != "record.json")
    assert one["loss"] == two["loss"] and len(one["loss"]) == 2 and set(one["skills"].values()) == {1.0}
    assert json.loads(files["two"]["record.json"]) == json.loads(json.dumps(two))
