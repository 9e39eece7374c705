"""The measuring tools, and the main job from end to end at its smallest size."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from io import StringIO

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import backbones, machine, main_job, measure
from bench.measure import Agreement, CheckFailed, Contestant, Journal, Ratio, Sample, Spread
from bench.outcome import Target


def sample(turn: int, wall: float, others: float = 0.0) -> Sample:
    return Sample(turn, wall, 2 * wall, others)


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0], [9.0, 1.0, 7.0, 3.0, 2.0, 8.0]])
def test_spread_is_numpys(values: list[float]) -> None:
    spread = Spread.of(values)
    expected = np.quantile(values, [0.5, 0.2, 0.8, 0.0])
    assert np.allclose([spread.median, spread.p20, spread.p80, spread.low], expected)
    assert spread.count == len(values)


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Spread.of([])


def test_interleaving_turns_round_and_skips_rounds() -> None:
    order: list[str] = []

    def contestant(name: str, every: int = 1) -> Contestant:
        def run() -> torch.Tensor:
            order.append(name)
            return torch.tensor(len(order))

        return Contestant(run, lambda result: order.append(f"checked {int(result)}"), every)

    samples = measure.interleave({"a": contestant("a"), "b": contestant("b"), "c": contestant("c", 2)}, 3)
    assert [x for x in order if len(x) == 1] == ["a", "b", "c", "b", "a", "a", "b", "c"]
    assert order[1::2] == [f"checked {2 * i + 1}" for i in range(8)]
    assert {name: [s.round for s in runs] for name, runs in samples.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
        "c": [0, 2],
    }


def test_a_sample_holds_wall_and_cpu_time_but_not_its_check() -> None:
    def busy() -> torch.Tensor:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        time.sleep(0.05)
        return torch.zeros(1)

    runs = measure.interleave({"x": Contestant(busy, lambda _: time.sleep(0.2))}, 1)["x"]
    assert runs[0].cpu >= 0.05
    assert runs[0].wall >= runs[0].cpu + 0.04
    assert runs[0].cpu < 0.15
    assert runs[0].others >= 0.0


def test_ratio_pairs_samples_of_one_round() -> None:
    samples = {"a": [sample(0, 2.0), sample(2, 30.0)], "b": [sample(0, 1.0), sample(1, 99.0), sample(2, 10.0)]}
    ratio = measure.ratio(samples, "a", "b")
    assert (ratio.wall.median, ratio.wall.low, ratio.wall.count) == (2.5, 2.0, 2)
    assert ratio.cpu == ratio.wall
    assert ratio.quiet


def test_ratio_leaves_busy_pairs_out_while_a_quiet_one_exists() -> None:
    busy = 2 * measure.BUSY
    samples = {"a": [sample(0, 8.0, busy), sample(1, 3.0)], "b": [sample(0, 1.0), sample(1, 1.0)]}
    assert measure.ratio(samples, "a", "b").wall == Spread.of([3.0])
    samples["b"][1] = sample(1, 1.0, busy)
    ratio = measure.ratio(samples, "a", "b")
    assert not ratio.quiet
    assert ratio.wall == Spread.of([8.0, 3.0])


def test_waiting_for_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 5.0, 5.0, 5.0 + measure.BUSY])  # seconds of CPU: a busy look, then a quiet one
    monkeypatch.setattr(measure, "_system_cpu", lambda: next(used))
    monkeypatch.setattr(measure.time, "sleep", lambda _: None)
    assert measure.wait_until_quiet(60.0)
    assert not measure.wait_until_quiet(0.0)


def test_agreement_keeps_the_first_and_compares_the_rest() -> None:
    agreement = Agreement("logits", 1e-3)
    agreement.check(torch.tensor([1.0, -2.0]))
    with pytest.raises(CheckFailed, match="nothing was compared"):
        agreement.finish()
    agreement.check(torch.tensor([1.001, -2.0]))
    agreement.finish()
    assert math.isclose(agreement.worst, 0.0005, rel_tol=1e-3)
    with pytest.raises(CheckFailed, match=r"logits: relative error 5\.00e-01"):
        agreement.check(torch.tensor([1.0, -1.0]))
    with pytest.raises(CheckFailed, match="shape"):
        agreement.check(torch.tensor([1.0]))


@pytest.mark.parametrize("wrong", [[1, 2, 4], [1, 2, 2]])
def test_agreement_without_tolerance_demands_equality(wrong: list[int]) -> None:
    agreement = Agreement("tokens")
    agreement.equal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
    with pytest.raises(CheckFailed):
        agreement.equal(torch.tensor(wrong), torch.tensor([1, 2, 3]))


def test_agreement_refuses_nan() -> None:
    with pytest.raises(CheckFailed):
        Agreement("logits", 1e-3).equal(torch.tensor([float("nan")]), torch.tensor([1.0]))


def test_targets() -> None:
    def of(value: float) -> Ratio:
        return Ratio("a", "b", Spread.of([value]), Spread.of([99.0]), True)

    at_least, at_most = Target(at_least=6.0), Target(at_most=1.15)
    assert at_least.met(of(6.0)) and not at_least.met(of(5.9))
    assert at_most.met(of(1.15)) and not at_most.met(of(1.16))
    assert (at_least.describe(), at_most.describe()) == (">= 6x", "<= 1.15x")


def test_twins_share_weights_and_nothing_else() -> None:
    model = backbones.llama(main_job.QUICK.backbone)
    other = backbones.twin(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine is theirs
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert other.model.layers[0] is not model.model.layers[0]


def test_machine_facts_are_json() -> None:
    facts = json.loads(json.dumps(machine.facts()))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["load"]) == 3


def test_journal_without_a_file_writes_nothing_and_with_one_a_line_each() -> None:
    Journal(None).write("note", value=1)
    out = StringIO()
    Journal(out).samples("case", {"a": [sample(0, 1.0), sample(1, 3.0)]})
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["kind"] for line in lines] == ["sample", "sample", "time"]
    assert all(line["schema"] == measure.SCHEMA and line["case"] == "case" for line in lines)
    assert lines[2]["wall"]["median"] == 2.0


def test_quick_main_job(quick: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = quick("main-job", "--rounds", "2")
    assert status == 0
    assert lines[0]["kind"] == "machine" and lines[-1]["kind"] == "end"
    checks = [line for line in lines if line["kind"] == "check"]
    assert {line["case"] for line in checks} == set(main_job.CASES)
    assert all(line["green"] and line["compared"] for line in checks)
    ratios = {(line["over"], line["under"]) for line in lines if line["kind"] == "ratio"}
    assert {("peft, row by row", "fastprompt"), ("fastprompt", "bare"), ("12 prompts", "4 prompts")} <= ratios
    assert all(line["met"] is None for line in lines if line["kind"] == "ratio")  # too small to judge
    shown = capsys.readouterr().out
    assert shown.index("green: greedy tokens, fastprompt and PEFT") < shown.index("peft, row by row / fastprompt")


def test_no_ratio_after_a_failed_check(
    quick: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_job, "LOGITS", 0.0)  # nothing but bit equality with PEFT passes
    status, lines = quick("main-job", "--rounds", "2", "--case", "forward")
    assert status == 1
    assert [line["kind"] for line in lines] == ["machine", "check", "end"]
    assert not lines[1]["green"] and "relative error" in str(lines[1]["error"])
    shown = capsys.readouterr()
    assert "CHECK FAILED" in shown.err and " / " not in shown.out.partition("load")[2]


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["main-job", "--case", "other"]])
def test_unknown_commands_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
