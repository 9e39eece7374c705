"""Choosing tokens: logits processors, most of them transformers', on each row, and one draw."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastprompt.errors import ArgumentError, FastPromptError
from fastprompt.serving.request import RowFailedError, SamplingParams, TokenLogprob


class CountPenalty(LogitsProcessor):
    """`logits -= frequency * count + presence * (count > 0)` over the generated tokens (OpenAI's API reference)."""

    def __init__(self, text_length: int, frequency: float, presence: float) -> None:
        self.text_length, self.frequency, self.presence = text_length, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = Counter(input_ids[0, self.text_length :].tolist())
        if not counts:
            return scores
        tokens = torch.tensor(list(counts), device=scores.device)
        times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores = scores.clone()
        scores[0, tokens] -= self.frequency * times + self.presence
        return scores


class NeverBefore(LogitsProcessor):
    """Takes `tokens` away while a row is shorter than `length`; transformers' own keeps them on one device."""

    def __init__(self, length: int, tokens: Sequence[int]) -> None:
        self.length, self.tokens = length, list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            return scores
        scores = scores.clone()
        scores[:, [token for token in self.tokens if token < scores.shape[1]]] = -torch.inf
        return scores


@dataclass(frozen=True)
class Choice:
    """What was chosen for a row; an error if its logits allow no choice."""

    token: int
    logprob: TokenLogprob | None = None
    error: FastPromptError | None = None


class Sampler:
    """One row's way to choose: its processors of its own tokens, and its own stream of random numbers."""

    def __init__(self, params: SamplingParams, index: int, text_length: int, ends: Sequence[int]) -> None:
        self.params = params
        self.own = _own_processors(params, text_length, ends)
        seed = random.SystemRandom().getrandbits(64) if params.seed is None else params.seed
        self._random = random.Random(f"{seed}:{index}")

    @property
    def warps(self) -> tuple[float, int, float, float] | None:
        """What does not depend on the row's tokens, so that rows may share it; None takes the maximum."""
        p = self.params
        return None if p.greedy else (float(p.temperature), p.top_k, float(p.top_p), float(p.min_p))

    def uniform(self) -> float:
        """The row's next random number, in [0, 1)."""
        return self._random.random()


def choose(rows: Sequence[tuple[Sampler, Sequence[int]]], logits: Tensor) -> list[Choice]:
    """A token for each row (its sampler, and all its tokens so far) from float `logits` `[R, V]`.

    What is chosen for a row depends on its own logits and random numbers alone.
    """
    raw = logits.float()
    found: list[Choice | None] = [None] * len(rows)
    logits = _processed(rows, raw, found)
    groups = defaultdict(list)
    for i, (sampler, _) in enumerate(rows):
        if found[i] is None:
            groups[sampler.warps].append(i)
    for warps, members in groups.items():
        part = logits if len(members) == len(rows) else logits[members]
        best, chosen = part.max(-1)
        if warps is not None:
            chosen = _draw(part, warps, [rows[i][0].uniform() for i in members])
        for i, token, value in zip(members, chosen.tolist(), best.tolist(), strict=True):
            found[i] = _choice(rows[i][0].params, token, value, raw[i])
    return [choice for choice in found if choice is not None]


def _processed(rows: Sequence[tuple[Sampler, Sequence[int]]], logits: Tensor, found: list[Choice | None]) -> Tensor:
    """The logits as the rows' own processors leave them, a copy where there are any; `found` gets their errors."""
    changed = [i for i, (sampler, _) in enumerate(rows) if sampler.own]
    logits = logits.clone() if changed else logits
    for i in changed:
        sampler, tokens = rows[i]
        ids = torch.tensor([list(tokens)], device=logits.device)
        try:
            logits[i] = sampler.own(ids, logits[i : i + 1])[0]
        except (ValueError, IndexError) as error:
            found[i] = Choice(0, error=ArgumentError(f"the row's logits cannot be changed as it asks: {error}"))
    return logits


def _choice(params: SamplingParams, token: int, best: float, raw: Tensor) -> Choice:
    if not best < float("inf"):
        why = f"the largest logit of the next token is {best}: train or store the prompt anew"
        return Choice(token, error=RowFailedError(why))
    return Choice(token, None if params.logprobs is None else _logprob(raw, token, params.logprobs))


def _logprob(raw: Tensor, token: int, count: int) -> TokenLogprob:
    values = raw.log_softmax(-1)
    top = values.topk(min(count, values.shape[0]))
    best = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, values[token].item(), best)


def _draw(logits: Tensor, warps: tuple[float, int, float, float], numbers: list[float]) -> Tensor:
    """One token a row `[R]`: where the row's cumulative probability first exceeds its random number."""
    probabilities = _warpers(*warps)(None, logits).softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    at = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, at, right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    made = LogitsProcessorList()
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    if min_p:
        made.append(MinPLogitsWarper(min_p))
    return made


def _own_processors(params: SamplingParams, text_length: int, ends: Sequence[int]) -> LogitsProcessorList:
    """Those that look at the row's tokens, or are its alone."""
    made = LogitsProcessorList()
    if params.logit_bias:
        made.append(SequenceBiasLogitsProcessor([[[token], float(b)] for token, b in params.logit_bias.items()]))
    if params.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.frequency_penalty or params.presence_penalty:
        made.append(CountPenalty(text_length, params.frequency_penalty, params.presence_penalty))
    never = [*ends, *params.stop_token_ids]
    if params.min_tokens and never:
        made.append(NeverBefore(text_length + params.min_tokens, never))
    return made
