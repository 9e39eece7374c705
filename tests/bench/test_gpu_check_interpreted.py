"""The numerics of gpu-check with the Triton kernels under their interpreter, in the environment of make test-triton."""

from __future__ import annotations

import importlib.util

import numpy
import pytest
import torch

from bench.gpu_check import numerics, records
from bench.gpu_check.setting import Setting
from bench.measure import SCHEMA
from fastprompt import env

_OLD_NUMPY = tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not _OLD_NUMPY, reason="Triton's interpreter needs numpy < 2.4"),
]
INTERPRETED = Setting("cpu", "triton", True)


@pytest.mark.parametrize(
    "unit", ["merge_states, fp16", "grouped_linear odd size, fp16", "prefix_attention no own keys, fp16"]
)
def test_kernels_pass(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the kernels are imported
    monkeypatch.setattr(Setting, "repeats", 1)
    assert env.triton_interpreted() and unit in numerics.units(INTERPRETED)
    lines: list[dict] = []
    numerics.run(unit, INTERPRETED, lambda kind, **values: lines.append({"kind": kind, **values}))
    assert [(line["kind"], line["who"]) for line in lines] == [("check", "triton")]
    assert all(0 <= share <= 1 for share in lines[0]["errors"].values())
    assert not torch.are_deterministic_algorithms_enabled()
    full = {"schema": SCHEMA, "part": "numerics", "unit": unit} | lines[0]
    assert records.problem(full) is None
