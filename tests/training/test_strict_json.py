"""Numbers that are not finite are null in every file that training writes, and reading the files back works."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import training_cases as cases

import fastprompt as fp
from fastprompt.training import checkpoint, files
from fastprompt.training.tasks.base import Item

ODD = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": None, "d": True, "e": "NaN"}}
STRICT = {"a": [1.5, None, [None, None]], "b": {"c": None, "d": True, "e": "NaN"}}


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def strict(folder: Path) -> dict[str, Any]:
    """Every JSON file below a folder, by its name, read strictly."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found[str(path.relative_to(folder))] = [json.loads(line, parse_constant=refuse) for line in lines]
    return found


@dataclass(frozen=True)
class Odd(cases.Follow):
    """Scored by numbers that are not finite, too."""

    def score(self, predictions: Sequence[Sequence[Any]], examples: Any, items: Sequence[Item]) -> dict[str, float]:
        return super().score(predictions, examples, items) | {"nan": math.nan, "huge": math.inf}


def odd(**changes: Any) -> fp.Job:
    options: dict[str, Any] = dict(task=Odd(), validation=cases.texts(4, 1), evaluate_every=1, steps=3)
    return cases.job("prompt_tuning", **(options | changes))


def test_files_hold_null(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", ODD)
    files.append_line(tmp_path / "b.jsonl", ODD)
    assert strict(tmp_path) == {"a.json": [STRICT], "b.jsonl": [STRICT]}
    assert files.read_lines(tmp_path / "b.jsonl") == [STRICT] and files.json_types(ODD) == STRICT


def test_a_run_writes_strict_json_and_goes_on_from_it(tmp_path: Path) -> None:
    def train(folder: str, steps: int, resume: bool = False) -> fp.JobResult:
        stop: dict[str, Any] = {"prune": lambda step, states: []}
        options = cases.CPU | {"logging_steps": 1}
        given = [odd()]
        if steps < 3:
            stop["listen"] = lambda progress: (_ for _ in ()).throw(KeyboardInterrupt) if progress.step == 3 else None
        run = dict(output_dir=tmp_path / folder, save_every=1, resume=resume, options=options, **stop)
        return fp.train(cases.causal(), given, **run).jobs["prompt_tuning"]

    whole = train("whole", 3)
    with pytest.raises(KeyboardInterrupt):
        train("cut", 2)
    cut = train("cut", 3, resume=True)
    for result in (whole, cut):
        assert [math.isnan(entry["scores"]["nan"]) for entry in result.history] == [True] * 3
        assert math.isinf(result.history[-1]["scores"]["huge"])
    assert cut.best_score == whole.best_score and cut.losses == whole.losses
    for folder in ("whole", "cut"):
        found = strict(tmp_path / folder)
        assert {Path(name).name for name in found} == {"training.json", "trainer_state.json", "prompt.json"}
        (best,) = found["best/prompt_tuning/prompt.json"]
        assert best["record"]["training"]["scores"]["nan"] is None


def test_losses_that_are_no_numbers_survive_a_checkpoint(tmp_path: Path) -> None:
    held = checkpoint.Checkpoint({}, {"losses": [[1, math.nan]]})
    held.write(tmp_path / "checkpoint-1", {"log_history": [{"loss": math.inf}]})
    assert checkpoint.Checkpoint.read(tmp_path / "checkpoint-1").state["losses"] == [[1, None]]
    assert strict(tmp_path)["checkpoint-1/trainer_state.json"] == [{"log_history": [{"loss": None}]}]


def test_a_sweep_writes_strict_json_and_goes_on_from_it(tmp_path: Path) -> None:
    def sweep(**options: Any) -> Any:
        common: dict[str, Any] = dict(output_dir=tmp_path, max_prompts_per_run=1, options=cases.CPU)
        return fp.sweep(cases.causal(), [odd()], {"seed": [0, 1]}, **common, **options)

    first = sweep()
    assert first.results[0]["scores"]["nan"] is None and first.results[0]["history"][0]["scores"]["huge"] is None
    assert {Path(name).name for name in strict(tmp_path)} == {"sweep.jsonl", "prompt.json"}
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"kind": "candidate"' in line)
    (tmp_path / "sweep.jsonl").write_text("".join(lines[:last]))  # as if it had been killed before its last result
    assert sweep(resume=True) == first
