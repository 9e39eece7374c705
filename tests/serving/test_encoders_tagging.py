"""Words, first sub-words and spans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_tools import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.serving.tagging import Span, found_words, given_words, join, need_fast, probabilities, spans


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        (["O", "O"], []),
        (["B-x", "I-x", "O", "I-x"], [("x", 0, 1), ("x", 3, 3)]),
        (["B-x", "B-x", "I-y", "I-y"], [("x", 0, 0), ("x", 1, 1), ("y", 2, 3)]),
        (["I-x", "I-x"], [("x", 0, 1)]),
        (["city", "city", "O", "dog"], [("city", 0, 1), ("dog", 3, 3)]),
        (["B-a-b", "I-a-b"], [("a-b", 0, 1)]),
        (["X-ray"], [("X-ray", 0, 0)]),
    ],
)
def test_spans_of_labels(labels: list[str], expected: list[tuple[str, int, int]]):
    assert spans(labels) == [Span(*e) for e in expected]


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=12))
def test_spans_are_those_of_seqeval(labels: list[str]):
    assert [(s.label, s.first, s.last) for s in spans(labels)] == [tuple(e) for e in get_entities(labels)]


def test_given_words_start_where_training_labels_them():
    words = ["New", "playing", "york", "x1,", "the"]
    text, places = join(words)
    (encoding,) = TOKENIZER([text]).encodings
    split = TOKENIZER(words, is_split_into_words=True)
    assert split["input_ids"] == encoding.ids
    first = [split.word_ids().index(i) for i in range(len(words))]
    found = given_words(encoding, places)
    assert [w.token for w in found] == first
    assert [text[w.start : w.end] for w in found] == words


def test_words_that_were_cut_off_are_named():
    with pytest.raises(ArgumentError, match="word 1"):
        given_words(TOKENIZER(["paris"]).encodings[0], [(0, 5), (6, 10)])


def test_found_words_have_their_characters():
    text = "  jim flew\tto paris, playing. "
    (encoding,) = TOKENIZER([text]).encodings
    words = found_words(encoding, text)
    assert [text[w.start : w.end] for w in words] == ["jim", "flew", "to", "paris", ",", "playing", "."]
    assert [encoding.offsets[w.token][0] for w in words] == [w.start for w in words]


def test_slow_tokenizers_are_refused():
    with pytest.raises(UnsupportedError, match="fast tokenizer"):
        need_fast(object())


def test_probabilities_are_torchs():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 30
    exact = torch.tensor(logits, dtype=torch.float64)
    np.testing.assert_allclose(probabilities(logits, "softmax"), exact.softmax(-1).numpy(), rtol=1e-12)
    np.testing.assert_allclose(probabilities(logits, "sigmoid"), exact.sigmoid().numpy(), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(probabilities(logits, "none"), logits)
    assert np.isfinite(probabilities(np.array([1e30, -1e30]), "sigmoid")).all()
