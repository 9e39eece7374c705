"""Whole sweeps: the best of all candidates is kept, and a sweep goes on where it stopped."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

import fastprompt as fp
from fastprompt import demo, store
from fastprompt.errors import ArgumentError, TrainingError, UnsupportedError
from fastprompt.training import Job
from fastprompt.training.sweep import run as sweep_run
from fastprompt.training.sweep.candidates import expand
from fastprompt.training.sweep.journal import Journal
from fastprompt.training.tasks import CausalLM

WEIGHTS = {"name": "a", "weights": "00"}
SPACE = {"num_virtual_tokens": [1, 2, 3], "learning_rate": [0.01, 0.1]}


def lines(folder):
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def test_a_sweep_trains_all_and_keeps_the_best(model, job, tmp_path):
    told = []
    result = fp.sweep(
        model, [job], SPACE, output_dir=tmp_path, eta=2, rungs=1, max_prompts_per_run=4, listen=told.append
    )
    assert [r["name"] for r in result.results] == [f"capital-{i}" for i in range(6)]
    stopped = [r["stopped"] for r in result.results]
    assert stopped.count("pruned") >= 2 and set(stopped) == {"pruned", "finished"}
    assert all(r["steps"] == (2 if r["stopped"] == "pruned" else 4) for r in result.results)
    best = max(r["best_score"] for r in result.results)
    assert result.best["capital"]["best_score"] == best and model.prompt_names == []
    prompt = store.load_prompt(tmp_path / "best" / "capital")
    assert prompt.length == result.best["capital"]["virtual_tokens"]
    assert prompt.record["sweep"]["best_score"] == best
    assert [line["run"] for line in lines(tmp_path) if line["kind"] == "run"] == [0, 1]
    assert {(p.run, p.runs, p.candidates) for p in told} == {(0, 2, 6), (1, 2, 6)}
    evaluated = [line for line in lines(tmp_path) if line["kind"] == "evaluation"]
    assert len(evaluated) == sum(len(r["history"]) for r in result.results)


def test_candidates_learn_what_they_would_learn_alone(model, job, tmp_path):
    result = fp.sweep(model, [job], {"learning_rate": [0.01, 0.1]}, output_dir=tmp_path, max_prompts_per_run=2)
    for i, rate in enumerate((0.01, 0.1)):
        alone = Job(**{**vars(job), "name": "alone", "learning_rate": rate})
        score = fp.train(model, [alone]).jobs["alone"].best_score
        model.remove_prompt("alone")
        assert result.results[i]["best_score"] == pytest.approx(score, rel=1e-4)


class _KillError(Exception):
    """Stands for a sweep that ends in the middle."""


@pytest.mark.parametrize("save_every", [None, 1])
def test_a_sweep_that_was_stopped_goes_on(model, job, tmp_path, save_every):
    options = {"max_prompts_per_run": 2, "eta": 2, "rungs": 1, "save_every": save_every}
    whole = fp.sweep(model, [job], SPACE, output_dir=tmp_path / "whole", **options)

    def kill(progress):
        if progress.run == 1 and progress.progress.step == 3:
            raise _KillError

    with pytest.raises(_KillError):
        fp.sweep(model, [job], SPACE, output_dir=tmp_path / "part", listen=kill, **options)
    assert model.prompt_names == []
    done = [line["name"] for line in lines(tmp_path / "part") if line["kind"] == "candidate"]
    assert len(done) == 2
    with (tmp_path / "part" / "sweep.jsonl").open("a") as stream:
        stream.write('{"kind": "cand')  # a line that was cut off
    trained = []
    resumed = fp.sweep(model, [job], SPACE, output_dir=tmp_path / "part", resume=True, listen=trained.append, **options)
    assert resumed.results == whole.results and resumed.best == whole.best
    assert all(name not in p.progress.states for p in trained for name in done)
    firsts = [p.progress.step for p in trained if p.run == 0]
    assert firsts[0] == (1 if save_every is None else 3)
    saved = [store.load_prompt(tmp_path / part / "best" / "capital") for part in ("whole", "part")]
    assert torch.equal(saved[0].weights(), saved[1].weights())
    assert not list((tmp_path / "part").glob("run-*"))


def test_a_folder_of_another_sweep_is_left_alone(model, job, tmp_path):
    fp.sweep(model, [job], {"learning_rate": [0.1]}, output_dir=tmp_path, max_prompts_per_run=1)
    before = (tmp_path / "sweep.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="pass resume or overwrite"):
        fp.sweep(model, [job], {"learning_rate": [0.1]}, output_dir=tmp_path)
    with pytest.raises(TrainingError, match="another sweep"):
        fp.sweep(model, [job], {"learning_rate": [0.2]}, output_dir=tmp_path, resume=True)
    assert (tmp_path / "sweep.jsonl").read_bytes() == before


def test_a_sweep_goes_on_over_its_own_backbone_only(model, job, tmp_path):
    fp.sweep(model, [job], {"learning_rate": [0.1]}, output_dir=tmp_path, max_prompts_per_run=1)
    other = fp.PromptedModel(demo.backbone(), demo.tokenizer())
    with torch.no_grad():
        other.backbone.model.norm.weight.mul_(1.01)
    with pytest.raises(TrainingError, match="another sweep: it was trained on the backbone"):
        fp.sweep(other, [job], {"learning_rate": [0.1]}, output_dir=tmp_path, resume=True)


def test_settings_that_differ_in_the_seed_have_a_mean_and_a_spread(model, job, tmp_path):
    space = {"num_virtual_tokens": [1, 2], "seed": [0, 1, 2]}
    found = fp.sweep(model, [job], space, output_dir=tmp_path, max_prompts_per_run=6)
    assert [line["values"] for line in found.seeds] == [{"num_virtual_tokens": 1}, {"num_virtual_tokens": 2}]
    for line, results in zip(found.seeds, (found.results[:3], found.results[3:]), strict=True):
        scores = [result["best_score"] for result in results]
        assert line["mean"] == pytest.approx(statistics.fmean(scores))
        assert line["spread"] == pytest.approx(statistics.stdev(scores)) and line["spread"] > 0
        assert (line["candidates"], line["seeds"], line["scored"]) == ([r["name"] for r in results], [0, 1, 2], 3)
    written = (tmp_path / "sweep.jsonl").read_bytes()
    assert lines(tmp_path)[-1] == {"kind": "seeds", "settings": found.seeds}
    again = fp.sweep(model, [job], space, output_dir=tmp_path, max_prompts_per_run=6, resume=True)
    assert again == found and (tmp_path / "sweep.jsonl").read_bytes() == written


def test_what_cannot_be_swept_is_refused_before_anything_is_written(model, job, tmp_path, monkeypatch):
    blind = Job(**{**vars(job), "validation": None})
    with pytest.raises(TrainingError, match="validation is None"):
        fp.sweep(model, [blind], SPACE, output_dir=tmp_path / "x")
    with pytest.raises(ArgumentError, match="fewer rungs"):
        fp.sweep(model, [job], SPACE, output_dir=tmp_path / "x", rungs=3)
    monkeypatch.setattr(sweep_run.torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(UnsupportedError, match="one process"):
        fp.sweep(model, [job], SPACE, output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_journal_without_an_end_is_read_to_its_last_line(job, tmp_path):
    candidates = expand([job], {"learning_rate": [0.1]})
    journal = Journal.open(tmp_path, candidates, WEIGHTS, resume=False, overwrite=False)
    journal.write("run", run=0, candidates=["capital-0"])
    whole = journal.path.read_bytes()
    for cut in range(1, 20):
        journal.path.write_bytes(whole[:-cut])
        again = Journal.open(tmp_path, candidates, WEIGHTS, resume=True, overwrite=False)
        assert [line["kind"] for line in again.lines] == ["sweep"]
        assert journal.path.read_bytes().endswith(b"}\n")


def test_every_candidate_is_checked_before_the_first_one_trains(model, job, tmp_path):
    told = []
    with pytest.raises(TrainingError) as caught:
        fp.sweep(
            model, [job], {"num_virtual_tokens": [1, 10**4], "batch_size": [1, 0]}, output_dir=tmp_path / "x",
            listen=told.append, max_prompts_per_run=1,
        )  # fmt: skip
    found = caught.value.problems
    assert len(found) == 2 and all(problem.startswith("job 'capital': ") for problem in found)
    assert "batch_size is 0" in found[0] and "10000 virtual tokens" in found[1]
    assert told == [] and model.prompt_names == [] and not (tmp_path / "x").exists()


def test_a_sweep_reads_its_examples_once_a_length(model, job, tmp_path, monkeypatch):
    seen = []
    prepared = CausalLM.prepare
    monkeypatch.setattr(
        CausalLM, "prepare", lambda task, *arguments: seen.append(arguments) or prepared(task, *arguments)
    )
    fp.sweep(model, [job], SPACE, output_dir=tmp_path, max_prompts_per_run=2)
    assert len(seen) == 2 * 3  # train and validation, of prompts of 1, 2 and 3 tokens
