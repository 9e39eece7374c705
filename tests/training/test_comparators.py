"""Other ways to learn the same: kept when a run goes on, the same in two processes, without copies of the backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import task_tools
import torch
import training_cases as cases
from process_cases import compare, save_comparison

from fastprompt.training import compared, comparison
from fastprompt.training.comparators import KINDS
from fastprompt.training.config import load_config
from fastprompt.training.launch import prepare_launch
from fastprompt.training.state import Run

CONFIG = """\
[run]
backbone = "backbone"
cpu = true
[defaults]
batch_size = 4
steps = 2
evaluate_every = 1
num_virtual_tokens = 2
task = { type = "sequence_classification", classes = ["good", "bad"] }
data = { train = "rows.jsonl", validation = "rows.jsonl" }
[[prompt]]
name = "one"
method = "p_tuning_v2"
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without dropout, whose head is not stored: it is drawn at every load."""
    folder = tmp_path_factory.mktemp("bert") / "backbone"
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    task_tools.bert("MaskedLM", **quiet).save_pretrained(folder)
    task_tools.bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, backbone: Path) -> Callable[..., Path]:
    """Writes a config file that compares one prompt with other ways."""
    (tmp_path / "backbone").symlink_to(backbone)
    rows = [
        {"text": f"the {word} was {label}", "label": label} for word in ("film", "plot") for label in ("good", "bad")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))

    def write(*kinds: str, more: str = "") -> Path:
        ways = "".join(f'[[comparator]]\nkind = "{kind}"\n' for kind in kinds)
        (tmp_path / "run.toml").write_text(CONFIG + ways + more)
        return tmp_path / "run.toml"

    return write


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that are learned, as they are."""
    found: list[str] = []
    original, of_prompt = comparison.compare, comparison.of_prompt

    def compare(comparator: Any, *arguments: Any, **options: Any) -> Any:
        found.append(comparator.kind)
        return original(comparator, *arguments, **options)

    def measure(*arguments: Any) -> Any:
        found.append("prompt")
        return of_prompt(*arguments)

    monkeypatch.setattr(compared, "compare", compare)
    monkeypatch.setattr(compared, "of_prompt", measure)
    return found


def test_a_run_that_goes_on_keeps_what_was_compared(
    config: Callable[..., Path], tmp_path: Path, learned: list[str]
) -> None:
    path = config(*KINDS)
    first = compare(path, tmp_path / "out")
    assert learned == ["prompt", *KINDS] and [line["way"] for line in first] == ["p_tuning_v2", *KINDS]
    kept = tmp_path / "out" / "comparison.jsonl"
    whole = kept.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5
    learned.clear()
    assert compare(path, tmp_path / "out", resume=True) == first and learned == []
    kept.write_text("".join(lines[:3]) + lines[3][:9])  # killed while the third way was written
    again = compare(path, tmp_path / "out", resume=True)
    assert learned == ["probe", "probe_mean"] and again[:3] == first[:3]
    timed = {"step_seconds", "peak_memory"}
    assert [{k: v for k, v in line.items() if k not in timed} for line in again] == [
        {k: v for k, v in line.items() if k not in timed} for line in first
    ]


def test_ways_with_other_settings_are_learned_anew(
    config: Callable[..., Path], tmp_path: Path, learned: list[str]
) -> None:
    compare(config("probe", "probe_mean"), tmp_path / "out")
    learned.clear()
    compare(config("probe", "probe_mean", more="learning_rate = 0.5\n"), tmp_path / "out", resume=True)
    assert learned == ["probe_mean"]


def test_nothing_is_kept_of_a_run_that_begins_anew(
    config: Callable[..., Path], tmp_path: Path, learned: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.jsonl").write_text('{"key": "x", "line": {}}\n')
    compare(config("probe"), tmp_path / "out")
    assert learned == ["prompt", "probe"]
    assert len((tmp_path / "out" / "comparison.jsonl").read_text().splitlines()) == 2


def test_two_processes_learn_what_one_learns(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config("full", "lora", "probe")
    alone = compare(path, tmp_path / "alone")
    cases.in_two_processes(save_comparison, path, tmp_path / "both")
    both = [torch.load(tmp_path / f"both.{rank}", weights_only=False) for rank in (0, 1)]
    written = json.loads((tmp_path / "both" / "results.json").read_text())["comparison"]
    assert both[0][0] == both[0][1] == written  # the second call takes them from the file
    for line, *others in zip(alone, *(found[0] for found in both), strict=True):
        for other in others:
            for key in ("task", "way", "score", "metric", "trained_parameters", "steps", "refused"):
                assert other[key] == line[key], (line["way"], key)


def test_no_copy_of_a_backbone_is_kept(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    made = Run.__post_init__
    monkeypatch.setattr(Run, "__post_init__", lambda run: (made(run), runs.append(run))[0])
    lines = compare(config("full"), tmp_path / "out")
    by_way = dict(zip([run.jobs[0].name for run in runs], runs, strict=True))
    assert len(by_way["one"].best) == 1
    for line in lines[1:]:
        run = by_way[f"one ({line['way']})"]
        assert run.best == {} and run.states[0].best_score == line["score"] is not None


def test_a_head_that_is_not_stored_is_the_same_at_every_load(config: Callable[..., Path]) -> None:
    first, again, other = (
        prepare_launch(load_config(config(), [f"run.seed={seed}"])).model.backbone for seed in (1, 1, 2)
    )
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
