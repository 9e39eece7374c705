"""Decoding steps through fixed buffers answer as packed ones; what records them here runs them again."""

import pytest
from serving_cases import alone, backbone, engine, greedy, run, save_prompts, texts, tokens

import fastprompt as fp
from fastprompt.model import PromptedModel
from fastprompt.serving.graphs import GraphRunner
from fastprompt.serving.runner import PackedRunner


class Again:
    """Stands in for a CUDA graph: the work is done again, its result goes where the first one is."""

    count = 0

    def __init__(self, work):
        self._work = work
        self.result = work().clone()

    def replay(self):
        Again.count += 1
        self.result.copy_(self._work())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    save_prompts(path, 5)
    model = PromptedModel(backbone())
    model.add_prompt("top", fp.PTuningV2(num_virtual_tokens=9, layers=(-1,), init_std=1.0), seed=9)
    model.save_prompt("top", path / "top")
    return path


def _recorded(folder, **options):
    made = engine(folder, **options)
    packed = PackedRunner(made.runner.backbone, made.pool.count + 1, made.pool.size)
    made.runner = GraphRunner(packed, made.scheduler.rules.max_rows, 64, record=Again)
    return made


@pytest.mark.parametrize("count", [1, 3, 23])
def test_answers_are_those_of_generate(folder, count):
    made = _recorded(folder)
    names = [None, "p0", "p1", "top", "p2", "p3", "p4"]
    requests = [greedy(text, names[i % 7], 3 + i % 10) for i, text in enumerate(texts(count, seed=count))]
    before = Again.count
    events = run(made, requests)
    assert Again.count > before
    for request in requests:
        expected = alone(folder, request.token_ids, request.prompt, request.params.max_tokens)
        assert tokens(events[request.request_id, 0]) == expected


def test_recordings_follow_the_bank(folder):
    """A bank without a budget grows: what was recorded reads the old arena."""
    made = _recorded(folder, device_bytes=None)
    for name in ("p0", "p2", "top", "p0"):
        (events,) = run(made, [greedy([5, 6, 7], name)]).values()
        assert tokens(events) == alone(folder, [5, 6, 7], name)
    made.residency.bank._grow("more", 10_000)
    (events,) = run(made, [greedy([5, 6, 7], "p2")]).values()
    assert tokens(events) == alone(folder, [5, 6, 7], "p2")


def test_numbers_of_rows_share_few_recordings(folder):
    made = _recorded(folder)
    for count in range(1, 17):
        run(made, [greedy(text, None, 4, ignore_eos=True) for text in texts(count)])
    assert sorted(made.runner._steps) == [1, 2, 4, 8, 16]
