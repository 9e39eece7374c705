"""An engine without a backbone: its tokens follow from the prompt and the text, so that answers can be foretold."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprompt.errors import ArgumentError, BankFullError, PromptNotFoundError
from fastprompt.prompts import PromptTuning
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.request import Delta, Generation, OverloadedError, TokenLogprob, Tokens
from fastprompt.serving.text import Pieces
from fastprompt.spec import BackboneSpec, LayerShape
from fastprompt.store import save_prompt

SPEC = BackboneSpec("llama", 12, 97, (LayerShape(2, 6, 6),), causal=True)
VOCAB = 1024
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def prompt_files(folder: Path, seed: int = 0, length: int = 3) -> dict[str, bytes]:
    """The files of a small prompt, by name."""
    save_prompt(folder, PromptTuning(num_virtual_tokens=length).build(SPEC, seed=seed))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_prompt(folder: Path, files: Mapping[str, bytes]) -> None:
    os.makedirs(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def expected(prompt: str | None, ids: list[int], count: int, choice: int = 0, seed: int | None = None) -> list[int]:
    """The tokens that the fake engine answers with."""
    found = []
    for place in range(count):
        key = repr((prompt, list(ids), choice, seed, place)).encode()
        found.append(4 + int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % (VOCAB - 4))
    return found


@dataclass(frozen=True)
class Limits:
    max_model_len: int = 512
    max_rows: int = 8
    max_queued: int = 64

    def room(self, virtual: int) -> int:
        return self.max_model_len - virtual


@dataclass(frozen=True)
class TierStats:
    prompts: int = 1
    bytes: int = 10
    hits: int = 4
    misses: int = 3
    evictions: int = 2
    promotions: int = 1
    budget: int | None = None


@dataclass(frozen=True)
class DiskStats:
    prompts: int = 3
    loads: int = 6
    bytes: int = 99
    failures: int = 0
    seconds: float = 0.5
    compile_seconds: float = 0.25


@dataclass(frozen=True)
class ResidencyStats:
    device: TierStats = TierStats()
    host: TierStats = TierStats(hits=5)
    disk: DiskStats = DiskStats()


@dataclass(frozen=True)
class Stats:
    waiting: int
    running: int
    waiting_by_prompt: dict[str | None, int]
    running_by_prompt: dict[str | None, int]
    steps: int = 7
    mix: int = 2
    generated_tokens: int = 11


@dataclass(frozen=True)
class Finished:
    prompt: str | None
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float | None
    seconds: float
    finish_reason: str


class FakeResidency:
    def __init__(self) -> None:
        self.pins: set[str] = set()
        self.dropped: list[str] = []
        self.unloaded: list[str] = []

    def pin(self, name: str) -> None:
        if len(self.pins) == 2:
            raise BankFullError("pins hold as much as they may: unpin others first")
        self.pins.add(name)

    def unpin(self, name: str) -> None:
        if name not in self.pins:
            raise PromptNotFoundError(f"prompt {name!r} is not pinned")
        self.pins.discard(name)

    def pinned(self) -> dict[str, bool]:
        return dict.fromkeys(self.pins, True)

    def tier(self, version: str) -> str:
        return "host"

    def unload(self, name: str) -> None:
        if name in self.pins:
            raise ArgumentError(f"prompt {name!r} is pinned: unpin it first")
        self.unloaded.append(name)

    def stats(self) -> ResidencyStats:
        return ResidencyStats()

    def drop(self, name: str) -> None:
        self.dropped.append(name)


@dataclass
class FakeEngine:
    """`pause` seconds pass before each token; `gate`, where given, is waited for before the first."""

    tokenizer: Any
    registry: PromptRegistry
    name: str = "backbone"
    limits: Limits = Limits()
    pause: float = 0.0
    gate: asyncio.Event | None = None
    fail_after: int | None = None
    error: Exception | None = None
    observe: Callable[[Any], None] = lambda finished: None
    ready: bool = False
    alive: bool = False
    rows: int = 0
    active: dict[str, str | None] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    seen: list[Generation] = field(default_factory=list)
    residency: FakeResidency = field(default_factory=FakeResidency)

    async def start(self) -> None:
        self.ready = self.alive = True

    async def close(self, drain: float | None = None) -> None:
        self.ready = self.alive = False
        while self.rows:  # they end at their next token
            await asyncio.sleep(0.001)

    def stats(self) -> Stats:
        running: dict[str | None, int] = {}
        for prompt in self.active.values():
            running[prompt] = running.get(prompt, 0) + 1
        return Stats(0, len(self.active), {}, running)

    async def generate(self, generation: Generation) -> AsyncIterator[Delta]:
        if len(self.active) >= self.limits.max_queued:
            raise OverloadedError("as many requests as are taken are under way", retry_after=2.5)
        if not generation.token_ids:
            raise ArgumentError("the text has no tokens: expected at least one")
        if any(not 0 <= token < VOCAB for token in generation.token_ids):
            raise ArgumentError(f"token_ids has ids outside 0 to {VOCAB - 1}")
        if generation.prompt is not None:
            self.registry.current(generation.prompt)
        self.seen.append(generation)
        self.active[generation.request_id] = generation.prompt
        self.rows += 1
        sent, reason = 0, "abort"
        try:
            async for delta in self._run(generation):
                sent += len(delta.tokens)
                reason = delta.finish_reason or reason
                yield delta
        finally:
            del self.active[generation.request_id]
            self.rows -= 1
            if reason == "abort":
                self.cancelled.append(generation.request_id)
            finished = Finished(generation.prompt, len(generation.token_ids), sent, 0.02, 0.3, reason)
            self.observe(finished)

    async def _run(self, generation: Generation) -> AsyncIterator[Delta]:
        params = generation.params
        pieces = [Pieces(self.tokenizer, i, params.stop, params.min_tokens) for i in range(params.n)]
        answers = [
            expected(generation.prompt, list(generation.token_ids), params.max_tokens, i, params.seed)
            for i in range(params.n)
        ]
        if self.gate is not None:
            await self.gate.wait()
        for place in range(params.max_tokens):
            await asyncio.sleep(self.pause)
            if not self.alive:
                yield Delta(0, "", (), (), "abort")
                return
            if self.fail_after == place and self.error is not None:
                raise self.error
            for index, piece in enumerate(pieces):
                if piece.stopped:
                    continue
                token = answers[index][place]
                stop = token in params.stop_token_ids
                last = "stop" if stop else "length" if place == params.max_tokens - 1 else None
                top = tuple((token + k, -1.5 - k) for k in range(params.logprobs or 0))
                logprobs = () if params.logprobs is None or stop else (TokenLogprob(token, -1.5, top),)
                new = Tokens("", index, () if stop else (token,), logprobs, last, token if stop else None)
                delta = piece.add(new)
                piece.stopped = piece.stopped or stop
                if delta is not None:
                    yield delta
