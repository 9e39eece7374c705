"""Result files: strict JSON, replaced as one, or appended a line at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def json_types(value: Any) -> Any:
    """A value as strict JSON gives it back: tuples as lists, and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {k: json_types(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, **options: Any) -> str:
    """Strict JSON of any value in JSON types."""
    return json.dumps(json_types(value), allow_nan=False, **options)


def write_json(path: Path, data: Any) -> None:
    """Write `data` so that a reader finds the old file or the new one; of several processes the first one does."""
    if not main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(dumps(record, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if there is no file; a last line that a crash cut off is left out and removed."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        with path.open("r+b") as stream:
            stream.truncate(len(whole) + len(newline))
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def main_process() -> bool:
    """Whether this process is the one that writes files: the only one, or the first of several."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
