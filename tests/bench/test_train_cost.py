"""The benchmark of training steps runs, compares like with like, and shows no ratio of steps that differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import train_cost, train_steps
from bench.__main__ import main
from bench.backbones import llama
from bench.measure import CheckFailed
from bench.train_cost import QUICK, growth_of_step
from bench.train_steps import CONFIGS, Checks, Work, bare, fastprompt_model, ours, peft_models, theirs

TIMED = [case for case in train_cost.CASES if case != "memory"]


def test_a_quick_run(quick: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = quick("train-cost", "--rounds", "2", "--case", *TIMED)
    assert status == 0
    assert lines[0]["kind"] == "machine" and lines[-1]["kind"] == "end"
    assert all(line["green"] and line["compared"] for line in lines if line["kind"] == "check")
    ratios = {(line["case"], line["over"], line["under"]) for line in lines if line["kind"] == "ratio"}
    each = {("step", f"{method}{side}", "bare") for method in CONFIGS for side in ("", ", PEFT")}
    together = {(case, f"{m}, PEFT", m) for case in TIMED[1:] for m in ("prefix tuning", "prompt tuning")}
    assert ratios == each | together | {(case, "bare, in parts", "bare") for case in TIMED[1:]}
    assert all(line["met"] is None for line in lines if line["kind"] == "ratio")  # too small to judge
    shown = capsys.readouterr().out
    assert shown.index("green: gradients, p-tuning, fastprompt and PEFT") < shown.index("p-tuning / bare")


def test_memory_is_told_and_judged_at_full_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {"bare": 100, "prompt tuning": 109, "p-tuning": 111}
    monkeypatch.setattr(train_cost, "_in_fresh_process", lambda name, _: grown.get(name, 105) << 20)
    for quick in (True, False):
        monkeypatch.setattr(train_cost, "FULL", replace(QUICK, processes=3))
        out = tmp_path / f"{quick}.jsonl"
        status = main(["train-cost", *(["--quick"] if quick else []), "--case", "memory", "--out", str(out)])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        met = {line["over"]: line["met"] for line in lines if line["kind"] == "memory ratio"}
        judged = {"prompt tuning": True, "p-tuning": False, "prefix tuning": True}
        assert {name: met[name] for name in judged} == ({name: None for name in judged} if quick else judged)
        assert all(met[f"{name}, PEFT"] is None for name in judged)
        assert status == (0 if quick else 1)


def test_memory_of_a_step_in_a_process_of_its_own() -> None:
    size = replace(QUICK, one=(16, 256, 64))
    row = 4 * size.one[0] * size.one[1]  # bytes of one float32 number a token
    least = size.backbone.layers * 3 * row * size.backbone.intermediate  # what a layer's MLP keeps for its backward
    grown = train_cost._in_fresh_process("prefix tuning", size)
    assert least < grown < 10 * least


@pytest.mark.parametrize("name", ["bare", "p-tuning", "p-tuning, PEFT"])
def test_every_contestant_has_a_step_to_measure(name: str) -> None:
    assert growth_of_step(name, QUICK, torch.get_num_threads()) >= 0


def test_no_ratio_where_gradients_differ(
    quick: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_steps, "GRADIENT", 0.0)  # nothing but bit equality with PEFT passes
    status, lines = quick("train-cost", "--rounds", "2", "--case", "together-16")
    assert status == 1
    assert [line["kind"] for line in lines] == ["machine", "check", "end"]
    assert "gradients" in str(lines[1]["error"])
    assert " / " not in capsys.readouterr().out.partition("load")[2]


@pytest.mark.parametrize("method", CONFIGS)
def test_steps_compute_the_gradients_of_each_prompts_own_loss(method: str) -> None:
    work = Work(QUICK.backbone, method, 3, 2, 7, 5)
    model = llama(work.backbone)
    prompted = fastprompt_model(model, work)
    loss, gradients = ours(prompted, work)()
    expected, alone = [], []
    for name, batch in zip(prompted.prompt_names, work.batches(), strict=True):
        parameters = list(prompted.library[name].parameters())
        alone.append(prompted(**batch, prompts=name).loss)
        expected += torch.autograd.grad(alone[-1], parameters)
    assert torch.allclose(loss, torch.stack(alone).mean())
    for got, want in zip(gradients, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    checks = Checks("ours and PEFT")
    checks.check((loss, gradients))
    checks.check(theirs(peft_models(model, work, prompted), work)())
    wrong = [1.001 * g for g in gradients]
    with pytest.raises(CheckFailed, match="gradients"):
        checks.check((loss, wrong))


def test_a_step_changes_no_weight() -> None:
    work = Work(QUICK.backbone, "p-tuning", 2, 2, 7, 5)
    prompted = fastprompt_model(llama(work.backbone), work)
    before = [p.clone() for p in prompted.library.parameters()]
    step = ours(prompted, work)
    first, again = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(before, prompted.library.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_the_bare_backbone_does_the_same_work_in_parts() -> None:
    work = Work(QUICK.backbone, "prefix tuning", 3, 2, 7, 5)
    model = llama(work.backbone)
    checks = Checks("bare")
    checks.check(bare(model, [work.text()])())
    checks.check(bare(model, work.batches())())
    assert checks.gradient.compared == 1
