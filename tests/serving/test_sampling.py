"""Tokens are drawn as the distribution says, row by row, by transformers' own processors."""

import math

import pytest
import torch

from fastprompt.errors import ArgumentError
from fastprompt.serving.request import RowFailedError, SamplingParams
from fastprompt.serving.sampling import CountPenalty, Sampler, choose

V = 40


def _rows(count=1, text=(1, 2, 3), made=(), **params):
    return [
        (Sampler(SamplingParams(max_tokens=20, **params), i, len(text), (0,)), [*text, *made]) for i in range(count)
    ]


def _logits(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_takes_the_maximum():
    logits = _logits(5)
    assert [c.token for c in choose(_rows(5, temperature=0.0), logits)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("params", "change"),
    [
        ({"temperature": 0.7}, lambda x: x / 0.7),
        ({"top_k": 3}, lambda x: x.masked_fill(x < x.topk(3).values[-1], -math.inf)),
        ({"min_p": 0.2}, lambda x: x.masked_fill(x.softmax(-1) < 0.2 * x.softmax(-1).max(), -math.inf)),
        ({"logit_bias": {7: 5.0}}, lambda x: x + 5.0 * (torch.arange(V) == 7)),
    ],
)
def test_draws_follow_the_distribution(params, change):
    logits = _logits(1)[0]
    expected = change(logits).softmax(-1)
    (row,) = _rows(1, seed=3, **params)
    draws = 4000
    counts = torch.zeros(V)
    for _ in range(draws):
        counts[choose([row], logits[None])[0].token] += 1
    error = (counts / draws - expected).abs()
    assert bool((error <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all())


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-8])
def test_the_coldest_draws_take_the_maximum(temperature):
    logits = _logits(5) * 10
    assert [c.token for c in choose(_rows(5, temperature=temperature), logits)] == logits.argmax(-1).tolist()


def test_a_nucleus_leaves_out_the_tail():
    logits = torch.tensor([[3.0, 2.0, 1.0] + [-9.0] * (V - 3)])
    (row,) = _rows(1, seed=1, top_p=0.7)
    assert {choose([row], logits)[0].token for _ in range(200)} == {0, 1}


def test_a_seed_repeats_and_choices_differ():
    def draws(index, seed=9):
        sampler = Sampler(SamplingParams(max_tokens=9, seed=seed), index, 1, ())
        return [choose([(sampler, [1])], _logits(1, i))[0].token for i in range(12)]

    assert draws(0) == draws(0) != draws(1)
    assert draws(0) != draws(0, seed=10)
    assert draws(0, seed=None) != draws(0, seed=None)


def test_a_row_draws_the_same_in_any_company():
    logits = _logits(9)
    kinds = [{"temperature": 0.0}, {"temperature": 1.3, "seed": 5}, {"top_k": 4, "seed": 6}, {"top_p": 0.8, "seed": 7}]

    def rows():
        return [_rows(1, **kinds[i % 4])[0] for i in range(9)]

    together = [c.token for c in choose(rows(), logits)]
    assert together == [choose([row], logits[i : i + 1])[0].token for i, row in enumerate(rows())]


def test_penalties_count_generated_tokens():
    scores = torch.zeros(1, V)
    changed = CountPenalty(3, 0.5, 1.0)(torch.tensor([[1, 2, 3, 7, 7, 8]]), scores)
    assert changed[0, 7] == -2.0 and changed[0, 8] == -1.5 and changed.count_nonzero() == 2
    assert scores.count_nonzero() == 0
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 1.0, 0.9
    assert choose(_rows(1, temperature=0.0, made=(7,), frequency_penalty=0.5), logits)[0].token == 8
    assert choose(_rows(1, temperature=0.0, text=(1, 7), repetition_penalty=2.0), logits)[0].token == 8


def test_no_end_before_min_tokens():
    logits = torch.zeros(1, V)
    logits[0, 0], logits[0, 5] = 3.0, 1.0
    wanted = {"temperature": 0.0, "min_tokens": 2}
    assert choose(_rows(1, made=(4,), **wanted), logits)[0].token == 5
    assert choose(_rows(1, made=(4, 4), **wanted), logits)[0].token == 0


def test_logits_that_are_no_numbers_fail_their_row_alone():
    logits = _logits(4)
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    for temperature in (0.0, 1.0):
        found = choose(_rows(4, temperature=temperature, seed=1), logits)
        assert [isinstance(c.error, RowFailedError) for c in found] == [False, True, True, False]


def test_what_a_row_asks_of_its_logits_fails_it_alone():
    """Logits may be narrower than the embedding: a bias on a token that cannot be chosen."""
    rows = [*_rows(1, temperature=0.0), *_rows(1, temperature=0.0, logit_bias={V + 3: 1.0}), *_rows(1, seed=2)]
    found = choose(rows, _logits(3))
    assert [isinstance(c.error, ArgumentError) for c in found] == [False, True, False]
    assert found[0].token == _logits(3)[0].argmax() and str(V + 3) in str(found[1].error)


def test_end_tokens_that_cannot_be_chosen_are_no_matter():
    sampler = Sampler(SamplingParams(temperature=0.0, min_tokens=2), 0, 1, (0, V + 7))
    logits = torch.zeros(1, V)
    logits[0, 0], logits[0, 5] = 3.0, 1.0
    (found,) = choose([(sampler, [1])], logits)
    assert found.error is None and found.token == 5


def test_given_logits_stay_as_they_are():
    logits = _logits(2)
    before = logits.clone()
    choose(_rows(2, logit_bias={3: 50.0}, frequency_penalty=1.0, made=(3, 4)), logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"n": 65}, "n is 65"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1"),
        ({"logit_bias": {-1: 1.0}}, "a token of logit_bias"),
        ({"stop": "END"}, "stop is 'END', expected a list"),
        ({"stop": [""]}, "not empty"),
        ({"stop": ["x" * 2**20]}, "1048576 characters"),
        ({"stop": ["x"] * 33}, "33 strings"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids"),
    ],
)
def test_what_no_row_can_have_is_refused(params, message):
    with pytest.raises(ArgumentError, match=message.replace("[", r"\[")):
        SamplingParams(**params)
