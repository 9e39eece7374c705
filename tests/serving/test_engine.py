"""The engine answers every row as if it were alone, whatever runs beside it and however little memory there is."""

import gc

import pytest
import torch
from serving_cases import VOCABULARY, engine, greedy, mixed, run, same_as_alone, save_prompts, texts, tokens

from fastprompt.errors import ArgumentError
from fastprompt.serving.padded import PaddedRunner
from fastprompt.serving.request import Generation, SamplingParams
from fastprompt.serving.scheduler import Rules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 6)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rules": Rules(max_rows=3, max_batch_tokens=7)},  # texts cut into pieces, most rows wait
        {"kv_bytes": 24 * 4 * 2 * 2 * 2 * 8 * 4},  # 24 blocks: rows are preempted
        {"rules": Rules(share_blocks=False), "block_size": 16},
        {"device_bytes": 45 * 2 * 2 * 2 * 8 * 4},  # the longest prompt and little more: others wait, and are evicted
    ],
    ids=["roomy", "pieces", "preempted", "unshared", "small-bank"],
)
def test_greedy_answers_are_those_of_generate(folder, options):
    made = engine(folder, **options)
    if "kv_bytes" in options:
        made.scheduler._forecast.fits = lambda rows: True  # as if no row ever grew
    requests = mixed(28)
    events = run(made, requests)
    same_as_alone(folder, requests, events)
    stats = made.stats()
    assert stats.blocks_free == stats.blocks and stats.running == stats.waiting == 0
    assert made.residency.stats().leased == 0
    if "kv_bytes" in options:
        assert stats.preemptions > 0


def test_padded_rows_are_the_same(folder):
    made = engine(folder)
    made.runner = PaddedRunner(made.runner.backbone)
    requests = mixed(10, seed=3, new=6)
    same_as_alone(folder, requests, run(made, requests))


def test_requests_may_come_at_any_step(folder):
    made, requests = engine(folder, rules=Rules(max_rows=4)), mixed(12, seed=1)
    later = requests[4:]

    def add(events):
        if later and sum(map(len, events.values())) >= 3 * (len(requests) - len(later)):
            made.add(later.pop())

    events = run(made, requests[:4], add)
    assert not later
    same_as_alone(folder, requests, events)


def test_equal_texts_share_blocks_under_one_version_only(folder):
    made = engine(folder)
    text = texts(1, longest=60, seed=5)[0] * 3
    first = greedy(text, "p0")
    run(made, [first])
    assert made.stats().hit_tokens == 0
    again, other = greedy(text, "p0"), greedy(text, "p2")
    events = run(made, [again, other])
    shared = (len(text) - 1) // 4 * 4
    assert made.stats().hit_tokens == shared
    same_as_alone(folder, [again, other], events)


def test_choices_of_one_request(folder):
    made = engine(folder)
    request = Generation(texts(1)[0], "p0", SamplingParams(max_tokens=8, temperature=1.0, seed=11, n=4))
    first = {index: tokens(e) for (_, index), e in run(made, [request]).items()}
    assert sorted(first) == [0, 1, 2, 3] and len({tuple(t) for t in first.values()}) > 1
    beside = [Generation(t, "p2", SamplingParams(max_tokens=9, temperature=2.0)) for t in texts(5, seed=8)]
    events = run(made, [*beside, request])
    assert {i: tokens(events[request.request_id, i]) for i in range(4)} == first


def test_cancelled_rows_leave_at_once(folder):
    made = engine(folder)
    stays, goes = greedy([5, 6, 7], "p0", 30, ignore_eos=True), greedy([8, 9], "p1", 30, ignore_eos=True)
    ended = []

    def cancel(events):
        if not ended and len(events.get((goes.request_id, 0), ())) == 5:
            ended.extend(made.cancel(goes.request_id))

    events = run(made, [stays, goes], cancel)
    assert [e.finish_reason for e in ended] == ["abort"]
    assert len(tokens(events[goes.request_id, 0])) == 5
    assert len(tokens(events[stays.request_id, 0])) == 30
    assert made.cancel(goes.request_id) == [] and made.stats().blocks_free == made.stats().blocks


def test_end_and_stop_tokens(folder):
    made = engine(folder)
    free = tokens(run(made, [greedy([5, 6, 7], "p0", 20, ignore_eos=True)]).popitem()[1])
    assert len(free) == 20
    stop = next(t for t in free if free.index(t) > 3)
    (events,) = run(made, [greedy([5, 6, 7], "p0", 20, ignore_eos=True, stop_token_ids=(stop,))]).values()
    assert tokens(events) == free[: free.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_token) == ("stop", stop)


def test_logprobs_are_the_models_own(folder):
    made = engine(folder)
    (events,) = run(made, [greedy([5, 6, 7], None, 3, ignore_eos=True, logprobs=4)]).values()
    model, ids = made.runner.backbone.model, [5, 6, 7]
    for event in events:
        (found,) = event.logprobs
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert found.token == event.tokens[0] == found.top[0][0]
        assert found.logprob == pytest.approx(expected[found.token].item(), abs=1e-5)
        assert [t for t, _ in found.top] == expected.topk(4).indices.tolist()
        ids.append(found.token)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (greedy([]), "no tokens"),
        (greedy([5, VOCABULARY]), f"token_ids has {VOCABULARY}"),
        (greedy([-1]), "token_ids has -1"),
        (greedy([5] * 250), "at most"),
        (greedy([5], stop_token_ids=(VOCABULARY,)), "stop_token_ids"),
        (greedy([5], logit_bias={VOCABULARY: 1.0}), "logit_bias"),
    ],
)
def test_what_can_never_run_is_refused(folder, request_, message):
    made = engine(folder)
    with pytest.raises(ArgumentError, match=message):
        made.add(request_)
    assert not made.busy


def test_a_row_may_be_as_long_as_memory_is(folder):
    made = engine(folder, kv_bytes=24 * 4 * 2 * 2 * 2 * 8 * 4)
    assert (made.limits.room(0), made.limits.room(200), made.limits.room(300)) == (96, 56, 0)
    with pytest.raises(ArgumentError, match="97 tokens, expected at most 96"):
        made.add(greedy([5] * 60, None, 37))
    (events,) = run(made, [greedy([5] * 60, "p0", 36, ignore_eos=True)]).values()
    assert len(tokens(events)) == 36


def test_whole_numbers_are_numbers(folder):
    params = SamplingParams(max_tokens=4, temperature=2, repetition_penalty=2, top_p=1, min_p=0, seed=1)
    same = SamplingParams(max_tokens=4, temperature=2.0, repetition_penalty=2.0, seed=1)
    requests = [Generation([5, 6], "p0", params), Generation([5, 6], "p0", same)]
    first, second = run(engine(folder), requests).values()
    assert tokens(first) == tokens(second) and len(tokens(first)) == 4


def test_nothing_is_kept_of_what_ended(folder):
    made = engine(folder)
    run(made, mixed(14))
    from fastprompt.serving.row import Row

    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Row)]


def test_a_long_prompt_gets_its_room_while_short_ones_keep_coming(folder):
    """The device holds 40 tokens; p2 has 33, and there is always somebody else with a shorter prompt."""
    made = engine(folder, device_bytes=40 * 2 * 2 * 2 * 8 * 4)
    big, came = greedy([5, 6, 7], "p2", 4, ignore_eos=True), []

    def more(events):
        if len(came) < 300 and len(came) < 8 + len(events):
            came.append(greedy([8, 9], ("p0", "p1", "p3", "p4")[len(came) % 4], 6, ignore_eos=True))
            made.add(came[-1])
        if (big.request_id, 0) in events:
            ended.append(len(came))

    ended: list[int] = []
    events = run(made, [greedy([1], "p0", 9), greedy([1], "p1", 9), big], more)
    assert ended[0] < 150 and len(came) == 300
    assert tokens(events[big.request_id, 0])
