"""Benchmarks at their tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import schema
from bench.__main__ import main


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """Runs a benchmark with `--quick` on one thread: its status, and its lines, which satisfy the schema."""

    def run(command: str, *options: str) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / "out.jsonl"
        status = main([command, "--quick", "--threads", "1", "--out", str(out), *options])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert schema.problems(lines) == []
        return status, lines

    return run
