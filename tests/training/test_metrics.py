"""Scores against values worked out by hand."""

import math
import sys
import warnings

import pytest

from fastprompt.errors import ArgumentError
from fastprompt.training import metrics


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_classification_of_two_classes():
    scores = metrics.classification([1, 1, 0, 0, 1], [1, 0, 0, 1, 1], 2)
    # class 1: tp 2, fp 1, fn 1; class 0: tp 1, fp 1, fn 1
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_classification_of_more_classes_has_no_plain_f1():
    scores = metrics.classification([0, 1, 1], [0, 1, 1], 3)
    assert scores == {"accuracy": 1.0, "f1_macro": 1.0, "mcc": 1.0}


@pytest.mark.parametrize("predicted", [[0, 0, 0], [1, 1, 1]])
def test_a_constant_classifier_has_no_correlation(predicted):
    assert metrics.classification(predicted, [0, 0, 0], 2)["mcc"] == 0.0


def test_entities_count_only_with_type_and_both_ends():
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC"]]
    guess = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC", "O"]]
    scores = metrics.entities(guess, wanted)
    assert scores["precision"] == pytest.approx(1 / 3)
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx(1 / 3)
    assert scores["accuracy"] == pytest.approx(5 / 7)


def test_entities_where_there_are_none():
    assert metrics.entities([["O", "O"]], [["O", "O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}


def test_ranking():
    scores = metrics.ranking([1, 2, 11, 1])
    assert scores["p_at_1"] == 0.5
    assert scores["p_at_10"] == 0.75
    assert scores["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 11 + 1) / 4)


@pytest.mark.parametrize(
    ("guess", "right", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["Paris"], 0.0, 2 / 3),
        ("a b b", ["b b c"], 0.0, 4 / 5),  # "a" is an article
        ("London", ["Paris", "in London"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("", ["the"], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
    ],
)
def test_answers_as_squad_compares_them(guess, right, exact, f1):
    scores = metrics.answers([guess], [right])
    assert scores["exact_match"] == exact
    assert scores["f1"] == pytest.approx(f1)


def test_generation_compares_texts_without_outer_space():
    assert metrics.generation([" a b", "c"], ["a b ", "d"], bleu=False) == {"exact_match": 0.5}


def test_bleu_of_equal_texts_is_100():
    pytest.importorskip("sacrebleu")
    text = "the cat sat on the red mat in paris"
    assert metrics.generation([text], [text], bleu=True)["bleu"] == pytest.approx(100.0)
    assert metrics.generation(["nothing of that at all here"], [text], bleu=True)["bleu"] < 10


def test_bleu_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ArgumentError, match=r"pip install .fastprompt\[train\]"):
        metrics.generation(["a"], ["a"], bleu=True)
