"""PEFT behind the same HTTP face: one adapter active at a time, the waiting requests of a tenant in one batch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fastprompt.serving.engine import Limits
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.request import Delta, Generation


class PeftEngine:
    """What a server made of PEFT and `generate` does: greedy, requests of one adapter batched, adapters in turn.

    `max_rows` bounds a batch, as it does in the engine it is compared to. Answers come whole, not piece by piece.
    """

    def __init__(
        self,
        backbone: Any,
        adapters: dict[str, Path],
        tokenizer: Any,
        name: str,
        registry: PromptRegistry,
        max_rows: int,
    ) -> None:
        self.tokenizer, self.name, self.registry, self.max_rows = tokenizer, name, registry, max_rows
        self.limits = Limits(4096, backbone.config.vocab_size)
        self.residency: Any = None
        self.observe: Callable[[Any], None] | None = None
        first, *others = adapters
        self._model = PeftModel.from_pretrained(backbone, adapters[first], adapter_name=first)
        for other in others:
            self._model.load_adapter(adapters[other], adapter_name=other)
        self._model.eval()
        self._waiting: OrderedDict[str | None, deque[tuple[Generation, asyncio.Future[list[int]]]]] = OrderedDict()
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    ready = alive

    async def start(self) -> None:
        self._task = asyncio.create_task(self._serve())

    async def close(self, drain: float | None = None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._pool.shutdown()

    def stats(self) -> Any:
        """Nothing that a comparison would read."""
        return None

    async def generate(self, generation: Generation) -> AsyncIterator[Delta]:
        """The whole answer as one piece."""
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(generation.prompt, deque()).append((generation, future))
        self._arrived.set()
        tokens = await future
        yield Delta(0, self.tokenizer.decode(tokens, skip_special_tokens=True), tuple(tokens), (), "length")

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            prompt, queue = self._waiting.popitem(last=False)
            batch = [queue.popleft() for _ in range(min(len(queue), self.max_rows))]
            if queue:
                self._waiting[prompt] = queue
            answers = await loop.run_in_executor(self._pool, self._run, prompt, [g for g, _ in batch])
            for (_, future), tokens in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(tokens)

    @torch.no_grad()
    def _run(self, prompt: str | None, batch: list[Generation]) -> list[list[int]]:
        longest, new = max(len(g.token_ids) for g in batch), max(g.params.max_tokens for g in batch)
        ids = torch.tensor([[0] * (longest - len(g.token_ids)) + list(g.token_ids) for g in batch])
        mask = torch.tensor([[0] * (longest - len(g.token_ids)) + [1] * len(g.token_ids) for g in batch])
        options = dict(attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        if prompt is None:
            with self._model.disable_adapter():
                out = self._model.generate(input_ids=ids, **options)
        else:
            self._model.set_adapter(prompt)
            out = self._model.generate(input_ids=ids, **options)
        return [row[longest : longest + g.params.max_tokens].tolist() for row, g in zip(out, batch, strict=True)]
