"""Answers of one mixed batch, held against the same rows alone, and the time each way takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastprompt.demo.training import Listener
from fastprompt.model import PromptedModel

LOGIT_TOLERANCE = 1e-5  # largest difference of logits allowed between a row in a batch and alone, of their scale


@dataclass(frozen=True)
class Row:
    """A text behind a prompt (None is the bare backbone) and the answer wanted."""

    prompt: str | None
    text: str
    target: str


@dataclass(frozen=True)
class Equality:
    """Rows of one mixed batch against the same rows alone.

    `logit_difference` is the largest difference of a forward's logits, divided by the largest logit.
    """

    rows: int
    prompts: int
    identical: int
    logit_difference: float
    tolerance: float = LOGIT_TOLERANCE

    @property
    def green(self) -> bool:
        return self.identical == self.rows and self.logit_difference <= self.tolerance


@dataclass(frozen=True)
class Timing:
    """Median seconds to answer the same rows: in one mixed batch, in a batch for each prompt, and row by row."""

    rows: int
    prompts: int
    repeats: int
    mixed: float
    by_prompt: float
    one_by_one: float


def generate(model: PromptedModel, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers of all rows in one batch, as token ids up to the eos token."""
    batch = model.tokenizer([row.text for row in rows], return_tensors="pt", padding=True).to(model.device)
    tokens = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        prompts=[row.prompt for row in rows],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return [_up_to(ids, model.tokenizer.eos_token_id) for ids in tokens[:, batch.input_ids.shape[1] :].tolist()]


def exact_match(model: PromptedModel, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> float:
    """Share of the rows whose answer, up to the end of its first line, is the target."""
    said = first_lines(model, answers)
    return sum(s == row.target.strip() for s, row in zip(said, rows, strict=True)) / len(rows)


def first_lines(model: PromptedModel, answers: Sequence[Sequence[int]]) -> list[str]:
    """The first line of every answer, as text."""
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in texts]


def compare(
    model: PromptedModel, rows: Sequence[Row], together: Sequence[list[int]], max_new_tokens: int, listen: Listener
) -> Equality:
    """Run every row alone and hold it against its answer `together` with the others, and its logits likewise."""
    mixed = _logits(model, rows)
    identical, difference, scale = 0, 0.0, 0.0
    for index, row in enumerate(rows):
        identical += generate(model, [row], max_new_tokens)[0] == together[index]
        (alone,) = _logits(model, [row])
        difference = max(difference, (alone - mixed[index]).abs().max().item())
        scale = max(scale, alone.abs().max().item())
        listen("check", index + 1, len(rows), f"{identical} identical")
    return Equality(len(rows), len({row.prompt for row in rows}), identical, difference / scale)


def time_ways(model: PromptedModel, rows: Sequence[Row], max_new_tokens: int, repeats: int, listen: Listener) -> Timing:
    """Answer `rows` in three ways, taking turns, `repeats` times after one warm-up."""
    names = list(dict.fromkeys(row.prompt for row in rows))
    by_prompt = [[row for row in rows if row.prompt == name] for name in names]
    ways = {"mixed": [list(rows)], "by_prompt": by_prompt, "one_by_one": [[row] for row in rows]}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, batches in ways.items():
            started = time.perf_counter()
            for batch in batches:
                generate(model, batch, max_new_tokens)
            seconds[way].append(time.perf_counter() - started)
        listen("time", turn + 1, repeats + 1, f"{len(rows)} rows")
    medians = {way: statistics.median(values[1:]) for way, values in seconds.items()}
    return Timing(len(rows), len({row.prompt for row in rows if row.prompt}), repeats, **medians)


@torch.no_grad()
def _logits(model: PromptedModel, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Logits `[N, vocabulary]` of every row's own tokens, from one forward."""
    batch = model.tokenizer([row.text for row in rows], return_tensors="pt", padding=True).to(model.device)
    logits = model(batch.input_ids, batch.attention_mask, prompts=[row.prompt for row in rows]).logits
    return [line[real.bool()] for line, real in zip(logits, batch.attention_mask, strict=True)]


def _up_to(ids: list[int], last: int) -> list[int]:
    return ids[: ids.index(last) + 1] if last in ids else ids
