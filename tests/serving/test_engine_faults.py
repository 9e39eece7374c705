"""What goes wrong with one row, prompt or step is its own affair: all other rows get their answers."""

import shutil

import pytest
import torch
from serving_cases import backbone, engine, greedy, mixed, run, same_as_alone, save_prompts, tokens

import fastprompt as fp
from fastprompt.errors import PromptNotFoundError
from fastprompt.serving.engine import StepError
from fastprompt.serving.request import Generation, RowFailedError, SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 6)
    return path


def test_a_bad_request_ends_alone(folder):
    made = engine(folder)
    good = mixed(7, seed=2)
    lost = greedy([5, 6], "nobody")
    long = greedy([5] * 230, "p2", 20)  # fits without its prompt's 33 virtual tokens
    expected = run(engine(folder), good)
    events = run(made, [lost, long, *good])
    assert isinstance(events[lost.request_id, 0][-1].error, PromptNotFoundError)
    assert "33 virtual tokens" in str(events[long.request_id, 0][-1].error)
    for request in good:
        assert tokens(events[request.request_id, 0]) == tokens(expected[request.request_id, 0])


def test_a_prompt_whose_numbers_overflow_ends_its_own_rows(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = fp.PromptedModel(backbone())
    (weight,) = model.add_prompt("huge", fp.PrefixTuning(num_virtual_tokens=3)).parameters()
    weight.data.fill_(3e38)
    model.save_prompt("huge", tmp_path / "huge")
    good, poison = mixed(7, seed=5), greedy([5, 6, 7], "huge")
    events = run(engine(tmp_path), [*good[:3], poison, *good[3:]])
    (ended,) = events[poison.request_id, 0]
    assert isinstance(ended.error, RowFailedError) and "nan" in str(ended.error)
    same_as_alone(folder, good, events)


def _failing(made, fails):
    """Let the backbone raise on batches of which `fails(slices)` is true."""
    run_ = made.runner.run

    def raises(slices, arenas):
        if fails(slices):
            raise RuntimeError("out of memory")
        return run_(slices, arenas)

    made.runner.run = raises


def test_a_row_that_the_backbone_fails_on_ends_alone(folder):
    made = engine(folder)
    good, poison = mixed(9, seed=7), greedy([77, 78, 77, 78], "p1")
    _failing(made, lambda slices: any(tuple(s.text[:4]) == (77, 78, 77, 78) for s in slices))
    events = run(made, [*good[:5], poison, *good[5:]])
    (ended,) = events[poison.request_id, 0]
    assert isinstance(ended.error, StepError) and "out of memory" in str(ended.error)
    same_as_alone(folder, good, events)
    assert made.residency.stats().leased == 0 and made.stats().blocks_free == made.stats().blocks


def test_a_batch_that_is_too_large_runs_in_parts(folder):
    made = engine(folder)
    _failing(made, lambda slices: len(slices) > 2)
    requests = mixed(7, seed=4)
    same_as_alone(folder, requests, run(made, requests))


def test_a_seeded_row_draws_on_as_if_nothing_had_failed(folder):
    request = Generation([5, 6, 7], "p0", SamplingParams(max_tokens=8, temperature=1.5, seed=3))
    (expected,) = run(engine(folder), [request]).values()
    made = engine(folder)
    _failing(made, lambda slices: len(slices) > 1)
    events = run(made, [request, *mixed(2)])
    assert tokens(events[request.request_id, 0]) == tokens(expected)


def test_a_lost_device_ends_the_engine(folder):
    """No later step could succeed: whoever runs the process should start it anew."""
    made = engine(folder)

    def lost(slices, arenas):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    made.runner.run = lost
    with pytest.raises(torch.AcceleratorError):
        run(made, mixed(3))


def test_prompts_that_cannot_come_nearer_end_the_rows_that_wait_for_one(folder, monkeypatch, caplog):
    made = engine(folder)
    run(made, [greedy([5, 6], "p0")])  # p0 is on the device now
    progress = made.residency.progress
    failures = iter([True, False])

    def fails():
        if next(failures, False):
            raise OSError("the file system is gone")
        return progress()

    monkeypatch.setattr(made.residency, "progress", fails)
    bare, there, lost = greedy([5, 6]), greedy([8, 9], "p0"), greedy([5, 6], "p1")
    events = run(made, [bare, there, lost])
    (ended,) = events[lost.request_id, 0]
    assert isinstance(ended.error, StepError) and "the file system is gone" in str(ended.error)
    assert "brought nearer" in caplog.text
    same_as_alone(folder, [bare, there], events)
    again = greedy([5, 6], "p1")
    same_as_alone(folder, [again], run(made, [again]))


def test_whatever_keeps_a_prompt_away_ends_its_own_row(folder, monkeypatch):
    made = engine(folder)
    acquire = made.residency.acquire

    def fails(name):
        if name == "p1":
            raise OSError("no such device")
        return acquire(name)

    monkeypatch.setattr(made.residency, "acquire", fails)
    lost, good = greedy([5, 6], "p1"), greedy([5, 6], "p0")
    events = run(made, [lost, good])
    assert "no such device" in str(events[lost.request_id, 0][-1].error)
    same_as_alone(folder, [good], events)
