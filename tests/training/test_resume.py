"""A run killed at any moment and resumed ends with bitwise the prompts of a run that was left alone."""

from __future__ import annotations

import copy
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cases as cases

import fastprompt as fp
from fastprompt.training import checkpoint
from fastprompt.training.fingerprint import fingerprint


def written(output: Path) -> dict[str, bytes]:
    """Every file of the prompts in an output folder."""
    files = [p for kind in ("prompts", "best") for p in (output / kind).rglob("*") if p.is_file()]
    return {str(p.relative_to(output)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[fp.TrainResult, dict[str, bytes]]:
    output = tmp_path_factory.mktemp("whole")
    result = cases.resumable(False, output)
    assert [p.name for p in checkpoint.checkpoints(output)] == ["checkpoint-8", "checkpoint-9"]
    assert result.jobs["cartridge"].stopped == "patience" and result.jobs["cartridge"].steps == 3
    return result, written(output)


def check_resumed(output: Path, uninterrupted: tuple[fp.TrainResult, dict[str, bytes]]) -> None:
    result = cases.resumable(True, output)
    assert result.jobs == uninterrupted[0].jobs and result.steps == uninterrupted[0].steps
    assert written(output) == uninterrupted[1]


def test_the_same_seed_gives_the_same_bits(uninterrupted: Any, tmp_path: Path) -> None:
    result = cases.resumable(False, tmp_path / "again")
    assert result.jobs == uninterrupted[0].jobs
    assert written(tmp_path / "again") == uninterrupted[1]


@pytest.mark.parametrize("step", [1, 5, 6, 9])
def test_killed_between_steps(step: int, uninterrupted: Any, tmp_path: Path) -> None:
    cases.run_until_killed(cases.killed_at_step, tmp_path, step)
    last = (step - 1) // 2 * 2
    assert [p.name for p in checkpoint.checkpoints(tmp_path)][-1:] == ([f"checkpoint-{last}"] if last else [])
    check_resumed(tmp_path, uninterrupted)


@pytest.mark.parametrize("after", ["fsync", "rename"])
def test_killed_while_saving(after: str, uninterrupted: Any, tmp_path: Path) -> None:
    cases.run_until_killed(cases.killed_while_saving, tmp_path, "checkpoint-4", after)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / ".checkpoint-4.new").exists()
    check_resumed(tmp_path, uninterrupted)
    assert not (tmp_path / ".checkpoint-4.new").exists()


def test_resuming_a_finished_run_trains_no_more(uninterrupted: Any, tmp_path: Path) -> None:
    cases.resumable(False, tmp_path)
    model, told = cases.causal(), []
    given = [cases.job("p_tuning", steps=2, name="other")]
    with pytest.raises(fp.FastPromptError, match="another run"):
        fp.train(model, given, output_dir=tmp_path, resume=True, options=cases.CPU)
    assert model.prompt_names == []
    result = cases.resumable(True, tmp_path, listen=told.append)
    assert told == [] and result.jobs == uninterrupted[0].jobs and written(tmp_path) == uninterrupted[1]


def test_a_run_resumes_with_its_jobs_in_their_order_and_with_their_data(tmp_path: Path) -> None:
    given = [cases.job("prompt_tuning", name=name, steps=2, train=cases.texts(6, n)) for n, name in enumerate("ab")]
    fp.train(cases.causal(), given, output_dir=tmp_path, options=cases.CPU)
    other = replace(given[1], train=cases.texts(6, 9))
    for changed, told in (
        (given[::-1], r"another order \(a, b\)"),
        ([given[0], other], "'b' has another train_digest"),
    ):
        with pytest.raises(fp.FastPromptError, match=told):
            fp.train(cases.causal(), changed, output_dir=tmp_path, resume=True, options=cases.CPU)


def test_a_run_resumes_over_its_own_backbone_only(tmp_path: Path) -> None:
    given = [cases.job("prompt_tuning", steps=2)]
    fp.train(cases.causal(), given, output_dir=tmp_path, options=cases.CPU)
    former = fingerprint(cases.causal().backbone)
    other = cases.causal()
    other.backbone.name_or_path = "another/one"
    with torch.no_grad():
        other.backbone.model.layers[1].mlp.up_proj.weight.add_(1e-3)  # of the same shapes
    with pytest.raises(fp.FastPromptError, match="another run: it was trained on the backbone") as caught:
        fp.train(other, given, output_dir=tmp_path, resume=True, options=cases.CPU)
    now = fingerprint(other.backbone)
    for word in (former["name"], former["weights"], "'another/one'", now["weights"], "choose another output_dir"):
        assert word in str(caught.value)
    assert other.prompt_names == []
    fp.train(cases.causal(), given, output_dir=tmp_path, resume=True, options=cases.CPU)


def test_a_fingerprint_sees_every_weight_but_those_of_the_head() -> None:
    backbone = cases.classifier("roberta").backbone
    first = fingerprint(backbone)["weights"]
    assert fingerprint(copy.deepcopy(backbone))["weights"] == first
    for name, parameter in backbone.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[-1] += 0.5
        assert (fingerprint(backbone)["weights"] == first) == name.startswith("classifier."), name
        with torch.no_grad():
            parameter.copy_(before)
    assert fingerprint(backbone.to(torch.bfloat16))["weights"] != first
    assert fingerprint(backbone.to("meta"))["weights"] != first  # known by its shapes alone


def test_a_checkpoint_has_no_backbone_and_no_pickle(tmp_path: Path) -> None:
    cases.resumable(False, tmp_path)
    (*_, newest) = checkpoint.checkpoints(tmp_path)
    assert {p.name for p in newest.iterdir()} == {"training.safetensors", "training.json", "trainer_state.json"}
    held = checkpoint.Checkpoint.read(newest)
    assert {name.split("/")[0] for name in held.tensors} == {"prompt", "best", "optimizer", "loss_sums"}
    (newest / "training.safetensors").write_bytes(b"x")
    with pytest.raises(fp.FastPromptError, match="digest"):
        checkpoint.Checkpoint.read(newest)
    (newest / "training.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(fp.FastPromptError, match="version"):
        checkpoint.Checkpoint.read(newest)
    (newest / "training.json").unlink()
    with pytest.raises(fp.FastPromptError, match="checkpoint"):
        checkpoint.Checkpoint.read(newest)


def test_a_former_run_is_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    cases.resumable(False, tmp_path)
    with pytest.raises(fp.FastPromptError, match="former run"):
        cases.resumable(False, tmp_path)
    given = [cases.job("cartridge", steps=1)]
    assert (tmp_path / "best" / "cartridge").exists()
    fp.train(cases.causal(), given, output_dir=tmp_path, overwrite=True, options=cases.CPU)
    assert not (tmp_path / "best" / "cartridge").exists()  # it would be the former run's
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_two_processes_killed_and_resumed(uninterrupted: Any, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cases.in_two_processes(cases.resumable_of_two, whole, None, options)
    cases.in_two_processes(cases.resumable_of_two, cut, 5, options, ends=-signal.SIGKILL)
    assert [p.name for p in checkpoint.checkpoints(cut)] == ["checkpoint-2", "checkpoint-4"]
    cases.in_two_processes(cases.resumable_of_two, cut, None, options)
    assert written(whole) == written(cut)
    found = [torch.load(f"{folder}.{rank}", weights_only=False) for folder in (whole, cut) for rank in (0, 1)]
    assert all(jobs == found[0] for jobs in found)
    for name, result in found[0].items():  # one process or two: the same training
        alone = uninterrupted[0].jobs[name]
        assert (result.stopped, result.steps, result.best_step) == (alone.stopped, alone.steps, alone.best_step)
        for (step, loss), (step_alone, loss_alone) in zip(result.losses, alone.losses, strict=True):
            assert step == step_alone and loss == pytest.approx(loss_alone, rel=1e-2)
