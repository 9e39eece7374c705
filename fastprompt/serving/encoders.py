"""Encoders and classifiers behind asyncio: requests under any prompts, batched into one forward."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastprompt.errors import ArgumentError, FastPromptError, UnsupportedError
from fastprompt.model import PromptedModel
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.backlog import Backlog
from fastprompt.serving.batcher import Batcher
from fastprompt.serving.encoder_options import EncoderOptions, TextLimits
from fastprompt.serving.encoder_rows import MEAN, EncoderRow, Pooling, RowRunner, task_of
from fastprompt.serving.encoder_texts import Texts
from fastprompt.serving.loaded import Loaded, LoadedPrompts, PromptSource
from fastprompt.serving.request import Finished, OverloadedError, RowFailedError
from fastprompt.serving.tier_stats import LoadedStats

Ids = Sequence[int]


@dataclass(frozen=True)
class Answer:
    """What a request is answered with.

    `values[i]` float32 belongs to text i: logits `[C]`, of a token classifier `[N, C]`, or an embedding `[E]`. `labels`
    name the C classes; `version` is the prompt's, None without one; `tokens` are the texts' own, all together.
    """

    values: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    activation: str  # of the logits: "softmax", "sigmoid" or "none"
    version: str | None
    tokens: int


@dataclass(frozen=True)
class EncoderStats:
    """An encoder engine at one moment; steps and tokens count from its start.

    The last step, one forward, had `rows` of `mix` prompts, those of `last_by_prompt`, and took `step_seconds`.
    `computed_tokens` are rows' own, `padded_tokens` what the forwards were as wide as.
    """

    waiting: int
    running: int
    waiting_by_prompt: dict[str | None, int]
    running_by_prompt: dict[str | None, int]
    steps: int
    computed_rows: int
    computed_tokens: int
    padded_tokens: int
    mix: int
    rows: int
    last_by_prompt: dict[str | None, int]
    step_seconds: float
    mean_step_seconds: float
    loaded: LoadedStats


class EncoderEngine:
    """Answers texts under prompts of a registry, rows of all clients together in one forward.

    Semantics, of each request whatever runs beside it:
        values[i] = model(ids[i], prompts=current version of `prompt`)       # alone, up to rounding
    A request keeps the version it began with, also when the prompt is replaced or deleted meanwhile. All methods are
    called on one event loop; one thread runs torch, one reads files. `observe` is called on the loop for each request
    that ended.

    Args:
        model: a sequence or token classifier, or a body without a head for embeddings.
        registry: where prompts come from by name.
        name: what the bare backbone is called.
    """

    def __init__(
        self,
        model: PromptedModel,
        tokenizer: Any,
        registry: PromptSource,
        *,
        name: str = "backbone",
        options: EncoderOptions | None = None,
    ) -> None:
        self.model, self.tokenizer, self.registry, self.name = model, tokenizer, registry, name
        self.options = options = options or EncoderOptions()
        self.observe: Callable[[Finished], None] = lambda finished: None
        self.task = task_of(model)
        self.limits = TextLimits.of(model, tokenizer, options)
        threads = options.threads or torch.get_num_threads()
        self._torch = _thread("torch", threads)
        self._files = _thread("files", 1)
        self._text = _thread("text", 1)  # a tokenizer serves one thread at a time
        self._texts = Texts(tokenizer, self._text, self.limits.max_length)
        self._runner = RowRunner(model)
        self._batcher = Batcher(self._runner, self._torch, options.batch)
        self._prompts = LoadedPrompts(
            registry,
            self._add,
            model.remove_prompt,
            files=self._files,
            thread=self._torch,
            max_prompts=options.max_prompts,
            max_bytes=options.max_prompt_bytes,
            host_bytes=options.host_bytes,
            storage=options.storage,
            check=self.limits.check_prompt,
        )
        self._backlog = Backlog(options.max_queued, "texts")
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.alive and not self._draining

    @property
    def alive(self) -> bool:
        """Whether batches are being run."""
        return self._batcher.alive

    async def start(self) -> None:
        """Start to run batches, on the running event loop."""
        self._batcher.start()

    async def close(self, drain: float | None = None) -> None:
        """Take no more requests, let those there end for at most `drain` seconds (None: not at all), stop for good."""
        self._draining = True
        if self.alive and drain:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain)
        await self._batcher.close()
        for executor in (self._torch, self._files, self._text):
            await asyncio.to_thread(executor.shutdown, cancel_futures=True)

    async def classify(self, texts: Sequence[Ids], prompt: str | None = None) -> Answer:
        """Logits of a sequence classifier `[C]` or a token classifier `[N, C]` for texts as token ids.

        Errors: ArgumentError for an empty or too long text and for ids out of range; OverloadedError; those of
        `LoadedPrompts.acquire`; RowFailedError where the prompt's answer is not finite. Other requests go on.
        """
        if self.task == "embedding":
            raise UnsupportedError(
                f"{self.name} has no classification head: serve a backbone of a class that has one, or ask for "
                "embeddings"
            )
        return await self._answer(texts, prompt, None)

    async def embed(self, texts: Sequence[Ids], prompt: str | None = None, pooling: Pooling = MEAN) -> Answer:
        """Vectors `[E]`, pooled from the last hidden states of each text's own tokens; errors as in `classify`."""
        return await self._answer(texts, prompt, pooling)

    async def encode(self, texts: Sequence[str], most: int | None = None) -> list[Any]:
        """As `Texts.encode`."""
        return await self._texts.encode(texts, most)

    async def room(self, prompt: str | None) -> int:
        """How many tokens a text may have under a prompt."""
        return self.limits.room(await self._prompts.version(prompt) if prompt is not None else None)

    def stats(self) -> EncoderStats:
        """The numbers of this moment."""
        batcher, totals = self._batcher, self._batcher.totals
        return EncoderStats(
            waiting=len(batcher.queue.rows),
            running=batcher.running.total(),
            waiting_by_prompt=dict(batcher.queue.by_tenant),
            running_by_prompt=dict(batcher.running),
            steps=totals.batches,
            computed_rows=totals.rows,
            computed_tokens=totals.tokens,
            padded_tokens=totals.padded_tokens,
            mix=len(totals.last_rows),
            rows=totals.last_rows.total(),
            last_by_prompt=dict(totals.last_rows),
            step_seconds=totals.last,
            mean_step_seconds=totals.mean,
            loaded=self._prompts.stats(),
        )

    @property
    def residency(self) -> LoadedPrompts:
        """The prompts in the model: to pin, and to be told of replaced ones."""
        return self._prompts

    async def _answer(self, texts: Sequence[Ids], prompt: str | None, pooling: Pooling | None) -> Answer:
        self.limits.check(texts)
        with self._admitted(prompt, texts):
            held = await self._prompts.acquire(prompt) if prompt is not None else None
            try:
                return self._labelled(texts, held, await self._run(texts, held, pooling))
            finally:
                if held is not None:
                    self._prompts.release(held)

    @contextmanager
    def _admitted(self, prompt: str | None, texts: Sequence[Ids]) -> Iterator[None]:
        """Count a request's rows and tell of its end, or refuse it where there are too many."""
        rows, begin, reason = len(texts), time.monotonic(), "abort"  # what a caller that goes away leaves behind
        if rows > self.options.max_queued:
            raise ArgumentError(f"the request has {rows} texts, expected at most {self.options.max_queued}: split it")
        wait = max(1.0, self._batcher.backlog())
        if not self.ready:
            raise OverloadedError("the server is starting or stopping: try again, or another one", wait)
        self._backlog.enter(prompt, rows, wait)
        self._idle.clear()
        try:
            yield
            reason = "stop"
        except Exception as error:
            reason = "error"
            if isinstance(error, FastPromptError) or self.alive:
                raise
            raise OverloadedError("the server is stopping: try another one", wait) from error
        finally:
            self._backlog.leave(prompt, rows)
            if not self._backlog.total:
                self._idle.set()
            self.observe(Finished(prompt, sum(map(len, texts)), 0, None, time.monotonic() - begin, reason))

    async def _run(self, texts: Sequence[Ids], held: Loaded | None, pooling: Pooling | None) -> list[np.ndarray]:
        room = self.limits.room(held.version if held else None)
        if too_long := [len(ids) for ids in texts if len(ids) > room]:
            raise ArgumentError(f"a text has {too_long[0]} tokens, expected at most {room} under this prompt: cut it")
        in_front = held.prompt.length if held and held.prompt.kind == "embedding" and self._embeds else 0
        name, key, outputs = (held.version.name, held.key, held.outputs) if held else (None, None, None)
        row = EncoderRow((), key, outputs or self._outputs, pooling)
        futures = [self._batcher.submit(name, len(ids) + in_front, replace(row, ids=ids)) for ids in texts]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()  # those left when one failed, or when the client has gone

    def _add(self, key: str, prompt: SoftPrompt) -> None:
        """Take a prompt into the model and try it, so that one that cannot run never meets another's rows."""
        self.model.add_prompt(key, prompt)
        outputs = prompt.head.outputs if prompt.head else self._outputs
        pooling = MEAN if self.task == "embedding" else None
        (tried,) = self._runner([EncoderRow((self._runner.some_id,), key, outputs, pooling)])
        if isinstance(tried, Exception):
            self.model.remove_prompt(key)
            if isinstance(tried, RowFailedError):
                raise tried
            raise RowFailedError(
                f"prompt {key.rsplit('@', 1)[0]!r} cannot run on this backbone: {_said(tried)}"
            ) from tried

    @property
    def _embeds(self) -> bool:
        """Whether virtual tokens of an embedding prompt make a row longer."""
        return not self.model._info.compiles

    @property
    def _outputs(self) -> int:
        return self.model.backbone.config.num_labels

    def _labelled(self, texts: Sequence[Ids], held: Loaded | None, values: Sequence[np.ndarray]) -> Answer:
        labels = _labels(self.model.backbone.config, held)
        problem = self.model.backbone.config.problem_type or ("regression" if len(labels) == 1 else "")
        activation = {"multi_label_classification": "sigmoid", "regression": "none"}.get(problem, "softmax")
        version = held.version.version if held else None
        return Answer(tuple(values), labels, activation, version, sum(map(len, texts)))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, FastPromptError) else repr(error)


def _labels(config: Any, held: Loaded | None) -> tuple[str, ...]:
    """Names of the outputs: the prompt's, or the backbone's where it has no head of its own."""
    outputs = held.outputs if held else None
    if held is not None and held.prompt.labels and len(held.prompt.labels) == (outputs or config.num_labels):
        return held.prompt.labels
    return tuple(f"LABEL_{i}" if outputs else config.id2label[i] for i in range(outputs or config.num_labels))


def _thread(name: str, torch_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, f"fastprompt-{name}", initializer=torch.set_num_threads, initargs=(torch_threads,))
