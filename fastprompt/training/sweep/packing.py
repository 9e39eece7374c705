"""How many candidates one run has room for: measured, not guessed."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastprompt.errors import ArgumentError
from fastprompt.model import PromptedModel
from fastprompt.training.items import make_items
from fastprompt.training.job import Job
from fastprompt.training.run import train
from fastprompt.training.sweep.candidates import Candidate

SIZES = (1, 2, 4)
USED_SHARE = 0.8


@dataclass(frozen=True)
class Room:
    """What was measured: (candidates, peak bytes) of single steps, the bytes allowed, and what fits."""

    peaks: tuple[tuple[int, int], ...]
    allowed: int
    fits: int


def measure(
    model: PromptedModel, candidates: Sequence[Candidate], allowed: int | None, options: Mapping[str, Any]
) -> Room:
    """Train the costliest candidates for a step, 1, 2 and 4 together, and see how the peak grows.

    `allowed` is in bytes; None is a share of what is free. Prompts that were added are removed again.
    """
    ranked = sorted(candidates, key=_cost, reverse=True)
    sizes = [size for size in SIZES if size <= len(ranked)]
    peaks: list[tuple[int, int]] = []
    for size in sizes:
        gc.collect()
        try:
            peak = _peak(model, [candidate.job for candidate in ranked[:size]], options)
        except torch.OutOfMemoryError:
            if not peaks:
                raise
            return Room(tuple(peaks), peaks[-1][1], peaks[-1][0])
        if peak is None:
            raise ArgumentError("the peak memory of a run is not known on this platform: give max_prompts_per_run")
        peaks.append((size, peak))
    bytes_allowed = free_bytes(model.device) if allowed is None else allowed
    return Room(tuple(peaks), bytes_allowed, capacity(peaks, bytes_allowed, len(ranked)))


def capacity(peaks: Sequence[tuple[int, int]], allowed: int, most: int) -> int:
    """How many candidates fit into `allowed` bytes, by a line through the peaks that lies on or above all of them."""
    if len(peaks) < 2:
        return most if peaks[0][1] <= allowed else 1
    (low, first), (high, last) = peaks[0], peaks[-1]
    slope = max((last - first) / (high - low), 0.0)
    rest = max(peak - slope * size for size, peak in peaks)
    if slope == 0:
        return most if rest <= allowed else 1
    return max(1, min(most, int((allowed - rest) // slope)))


def packs(candidates: Sequence[Candidate], size: int) -> list[list[Candidate]]:
    """Runs of at most `size` candidates, equal in size as far as possible, those of equal length together."""
    ranked = sorted(candidates, key=lambda candidate: candidate.job.total_steps())  # stable
    count = -(-len(ranked) // size)
    ends = [len(ranked) * i // count for i in range(count + 1)] if count else [0]
    return [ranked[a:b] for a, b in pairwise(ends)]


def free_bytes(device: torch.device) -> int:
    """The bytes a process may come to hold: what it holds, and a share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.memory_allocated(device) + int(free * USED_SHARE)
    try:
        available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
        held = _kilobytes(Path("/proc/self/status"), "VmRSS")
    except (OSError, TypeError):
        raise ArgumentError(
            "the free memory is not known on this platform: give memory or max_prompts_per_run"
        ) from None
    return held + int(available * USED_SHARE)


def _kilobytes(path: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", path.read_text())
    return int(found[1]) * 1024  # type: ignore[index]


def _peak(model: PromptedModel, jobs: Sequence[Job], options: Mapping[str, Any]) -> int | None:
    """The peak of one step of these jobs, on the longest of their examples."""
    changes: dict[str, Any] = {"validation": None, "patience": None, "epochs": None, "steps": 1}
    once = [replace(job, name=f"{job.name} measured", train=_longest(model, job), **changes) for job in jobs]
    try:
        return train(model, once, **options).peak_memory
    finally:
        for job in once:
            if job.name in model.library:
                model.remove_prompt(job.name)


def _longest(model: PromptedModel, job: Job) -> Any:
    """The examples of a batch that have the most tokens, of those that train."""
    (items, _), _ = make_items(model, job)
    order = sorted(items, key=lambda item: -sum(len(row.input_ids) for row in item.rows))
    examples: Any = job.train
    return examples.select([item.example for item in order[: job.batch_size]])


def _cost(candidate: Candidate) -> int:
    """A rough order of what candidates take: rows times the positions their prompt takes."""
    config = candidate.job.config
    return candidate.job.batch_size * (0 if config is None else config.num_virtual_tokens)
