"""No row ever sees what was computed under another prompt, or under what its own prompt was before."""

import random
import shutil

import pytest
from serving_cases import alone, backbone, engine, greedy, run, save_prompts, texts, tokens

import fastprompt as fp
from fastprompt import store
from fastprompt.model import PromptedModel
from fastprompt.serving import engine as engine_module

TEXT = texts(1, seed=21)[0] * 6  # several blocks long


@pytest.fixture
def folder(tmp_path):
    save_prompts(tmp_path, 5)
    return tmp_path


def _replace(registry, name, seed):
    """Give a name another prompt of the same method and length."""
    model = PromptedModel(backbone())
    model.add_prompt("new", fp.PrefixTuning(num_virtual_tokens=7, init_std=1.0), seed=seed)
    path = registry.folder.parent / "made"
    store.save_prompt(path, model.remove_prompt("new"), overwrite=True)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    shutil.rmtree(path)
    return registry.put(name, files)


def _leaks(folder):
    """Prompts whose row, asked last of all with the one text, is not answered as it would be alone."""
    made = engine(folder)
    names = [None, "p0", "p1", "p2", "p3", "p4"]
    wrong = []
    for name in names + names[::-1]:
        (events,) = run(made, [greedy(TEXT, name)]).values()
        if tokens(events) != alone(folder, TEXT, name):
            wrong.append(name)
    assert made.stats().hit_tokens > 0
    return wrong


def test_equal_texts_under_different_prompts(folder):
    assert _leaks(folder) == []


def test_this_would_be_noticed_without_the_salt(folder, monkeypatch):
    monkeypatch.setattr(engine_module, "salt", lambda secret, version: b"")
    assert _leaks(folder)


def test_equal_texts_at_once(folder):
    made = engine(folder)
    names = [None, "p0", "p1", "p2", "p3", "p4"] * 3
    requests = [greedy(TEXT, name) for name in names]
    events = run(made, requests)
    for request in requests:
        assert tokens(events[request.request_id, 0]) == alone(folder, TEXT, request.prompt)


def test_a_replaced_prompt_leaves_nothing_behind(folder):
    made = engine(folder)
    before = alone(folder, TEXT, "p0")
    (first,) = run(made, [greedy(TEXT, "p0")]).values()
    assert tokens(first) == before
    _replace(made.residency.registry, "p0", seed=99)
    after = alone(folder, TEXT, "p0")
    assert after != before
    (second,) = run(made, [greedy(TEXT, "p0")]).values()
    assert tokens(second) == after


def test_rows_under_way_finish_on_the_version_they_began_with(folder):
    made = engine(folder)
    before = alone(folder, TEXT, "p0", 24)
    early, late = greedy(TEXT, "p0", 24), greedy(TEXT, "p0", 24)

    def replace(events):
        if len(events.get((early.request_id, 0), ())) == 5 and (late.request_id, 0) not in events:
            _replace(made.residency.registry, "p0", seed=99)
            made.add(late)
            events[late.request_id, 0] = []

    events = run(made, [early], replace)
    assert tokens(events[early.request_id, 0]) == before
    assert tokens(events[late.request_id, 0]) == alone(folder, TEXT, "p0", 24) != before


def test_a_name_deleted_and_made_again(folder):
    made = engine(folder)
    registry = made.residency.registry
    run(made, [greedy(TEXT, "p0")])
    registry.delete("p0")
    (events,) = run(made, [greedy(TEXT, "p0")]).values()
    assert events[-1].finish_reason == "error"
    _replace(registry, "p0", seed=7)
    (events,) = run(made, [greedy(TEXT, "p0")]).values()
    assert tokens(events) == alone(folder, TEXT, "p0")


@pytest.mark.parametrize("seed", range(3))
def test_random_replacement_under_load(folder, seed):
    """Every row answers as the version that its name stood for when it came, or one that came while it waited."""
    rng = random.Random(seed)
    made = engine(folder, device_bytes=60 * 2 * 2 * 2 * 8 * 4)
    registry = made.residency.registry
    allowed: dict[str, list[list[int]]] = {}
    current = {f"p{i}": alone(folder, TEXT, f"p{i}") for i in range(5)}
    prompts: dict[str, str] = {}

    def disturb(events):
        if rng.random() < 0.15:
            name = f"p{rng.randrange(5)}"
            _replace(registry, name, rng.randrange(10**6))
            current[name] = alone(folder, TEXT, name)
            for request, prompt in prompts.items():
                if prompt == name and not events.get((request, 0)):
                    allowed[request].append(current[name])
        if len(prompts) < 40:
            request = greedy(TEXT, f"p{rng.randrange(5)}")
            prompts[request.request_id] = request.prompt
            allowed[request.request_id] = [current[request.prompt]]
            made.add(request)

    first = greedy(TEXT, "p0")
    prompts[first.request_id], allowed[first.request_id] = "p0", [current["p0"]]
    events = run(made, [first], disturb)
    assert len(events) == 40
    for request in prompts:
        assert tokens(events[request, 0]) in allowed[request]
