"""The loop: one call of `step` schedules, runs and samples; everything in it happens in one thread."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastprompt.errors import ArgumentError, FastPromptError
from fastprompt.serving.blocks import BlockPool, salt
from fastprompt.serving.request import Generation, Tokens
from fastprompt.serving.residency import Residency
from fastprompt.serving.row import Row
from fastprompt.serving.runner import Runner, Slice
from fastprompt.serving.sampling import Choice, Sampler, choose
from fastprompt.serving.scheduler import Admission, Piece, Rules, Scheduler, Tenant

_log = logging.getLogger(__name__)


class StepError(FastPromptError, RuntimeError):
    """Something failed while a row ran, or was to run, that is not the request's fault."""


@dataclass(frozen=True)
class Limits:
    """What one row may be: `max_model_len` tokens with text, new tokens and virtual tokens, ids below `vocab_size`.

    Text and new tokens together are at most `max_own_tokens`, where memory holds no more; None where it does.
    """

    max_model_len: int
    vocab_size: int
    end_tokens: tuple[int, ...] = ()
    max_own_tokens: int | None = None

    def room(self, virtual: int) -> int:
        """Text and new tokens that a row may have behind so many virtual ones."""
        left = self.max_model_len - virtual
        return max(0, left if self.max_own_tokens is None else min(left, self.max_own_tokens))


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; tokens and steps count from its start. The last step had `rows` of `mix` prompts."""

    waiting: int
    running: int
    waiting_by_prompt: dict[Tenant, int]
    running_by_prompt: dict[Tenant, int]
    blocks: int
    blocks_free: int
    blocks_shared: int
    asked_tokens: int
    hit_tokens: int
    preemptions: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    mix: int
    rows: int


class Engine:
    """Rows of many prompts, batched anew at every step.

    Semantics::

        engine.add(generation)          # checked; its n rows wait
        while engine.busy:
            for tokens in engine.step(): ...

    A row keeps the version of its prompt that it was admitted with. A bad request raises in `add` or ends its own rows
    with an error; the others never notice. Greedy tokens equal those of `PromptedModel.generate`.
    """

    def __init__(
        self, runner: Runner, pool: BlockPool, residency: Residency, limits: Limits, rules: Rules | None = None
    ) -> None:
        self.runner, self.pool, self.residency, self.limits = runner, pool, residency, limits
        self.scheduler = Scheduler(pool, rules or Rules(), self._admit, self._chain_start)
        self._secret = secrets.token_bytes(32)
        self._rows: dict[str, list[Row]] = {}
        self._steps = self._computed = self._generated = self._mix = self._batch = 0

    @property
    def busy(self) -> bool:
        """Whether any row waits or runs."""
        return bool(self._rows)

    @property
    def waits(self) -> bool:
        """Whether there are rows, or pinned prompts that are not on the device yet."""
        return self.busy or self.residency.waits

    @property
    def steps(self) -> int:
        """Batches run so far."""
        return self._steps

    def check(self, generation: Generation) -> None:
        """Raise ArgumentError for a request that can never run."""
        tokens, params, limits = generation.token_ids, generation.params, self.limits
        if not tokens:
            raise ArgumentError("the text has no tokens: expected at least one")
        named = {"token_ids": tokens, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for name, ids in named.items():
            bad = next((token for token in ids if not _is_token(token, limits.vocab_size)), None)
            if bad is not None:
                raise ArgumentError(f"{name} has {bad!r}, expected token ids from 0 to {limits.vocab_size - 1}")
        self._check_length(len(tokens), params.max_tokens, 0)

    def _check_length(self, text: int, new: int, virtual: int) -> None:
        most = self.limits.room(virtual)
        if text + new > most:
            behind = f" behind {virtual} virtual tokens" if virtual else ""
            raise ArgumentError(
                f"the text has {text} tokens and max_tokens is {new}: {text + new} tokens{behind}, expected at most "
                f"{most}"
            )

    def add(self, generation: Generation) -> None:
        """Take a request in. Raises ArgumentError for one that can never run."""
        self.check(generation)
        if generation.request_id in self._rows:
            raise ArgumentError(f"request_id {generation.request_id!r} is running already: choose another")
        ends = () if generation.params.ignore_eos else self.limits.end_tokens
        rows = [
            Row(generation, i, Sampler(generation.params, i, len(generation.token_ids), ends), ends)
            for i in range(generation.params.n)
        ]
        self._rows[generation.request_id] = rows
        for row in rows:
            self.scheduler.add(row)

    def cancel(self, request_id: str, index: int | None = None) -> list[Tokens]:
        """End a request's rows, or one of them, now; what they are answered with. An unknown one has ended already."""
        rows = [row for row in self._rows.get(request_id, ()) if index in (None, row.index)]
        return [self._end(row, "abort") for row in rows]

    def step(self) -> list[Tokens]:
        """Run one batch; what came out of it."""
        events = self._progress()
        pieces = self.scheduler.schedule()
        events += [self._end(row, "error", error=error) for row, error in self.scheduler.failed]
        self.scheduler.failed.clear()
        if pieces:
            self._count(pieces)
            events += self._run(pieces)
        return events

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        scheduler, pool = self.scheduler, self.pool
        running = scheduler.running_by_prompt()
        return EngineStats(
            waiting=scheduler.waiting,
            running=sum(running.values()),
            waiting_by_prompt=scheduler.waiting_by_prompt(),
            running_by_prompt=dict(running),
            blocks=pool.count,
            blocks_free=pool.free,
            blocks_shared=pool.cached,
            asked_tokens=pool.asked_tokens,
            hit_tokens=pool.hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            mix=self._mix,
            rows=self._batch,
        )

    def _progress(self) -> list[Tokens]:
        """Bring prompts a step nearer; where that fails, rows that wait for one end, and the others go on."""
        try:
            self.residency.progress()
        except Exception as error:  # what concerns one prompt never comes here
            _log.exception("prompts could not be brought nearer")
            failure = StepError(f"prompts could not be brought to the device: {error!r}")
            waiting = [row for rows in self._rows.values() for row in rows if not self._has_prompt(row)]
            return [self._end(row, "error", error=failure) for row in waiting]
        return []

    def _has_prompt(self, row: Row) -> bool:
        return row.prompt is None or row.lease is not None or self.residency.on_device(row.prompt)

    def _run(self, pieces: list[Piece]) -> list[Tokens]:
        """Run pieces through the backbone and choose what follows; a batch that fails is halved until what fails stands
        alone."""
        complete = [piece.row for piece in pieces if piece.complete]
        try:
            logits = self.runner.run([_slice(piece) for piece in pieces], self.residency.arenas())
            choices = choose([(row.sampler, row.tokens) for row in complete], logits) if complete else []
        except torch.AcceleratorError:  # the device is lost: no later step would succeed either
            raise
        except Exception as error:  # whatever a backbone raises, it must not stop the loop
            if len(pieces) > 1:
                middle = len(pieces) // 2
                return self._run(pieces[:middle]) + self._run(pieces[middle:])
            _log.exception("the backbone failed on a row of prompt %r", pieces[0].row.prompt)
            failure = StepError(f"the backbone failed on this row: {error!r}")
            return [self._end(pieces[0].row, "error", error=failure)]
        self.scheduler.ran(pieces)
        return [self._take(row, choice) for row, choice in zip(complete, choices, strict=True)]

    # rows ------------------------------------------------------------------------------------------------------------

    def _admit(self, row: Row) -> Admission:
        """Acquire the row's prompt, unless it has it from before."""
        if row.prompt is None or row.lease is not None:
            return Admission.READY
        try:
            lease = self.residency.acquire(row.prompt)
        except FastPromptError:
            raise
        except Exception as error:  # a full device, a broken disk: it must not stop the loop
            _log.exception("prompt %r could not be acquired", row.prompt)
            raise StepError(f"prompt {row.prompt!r} could not be brought to the device: {error!r}") from error
        if lease is None:
            return Admission.CROWDED if self.residency.crowded else Admission.LATER
        try:
            self._check_length(row.text_length, row.generation.params.max_tokens, lease.extent.shift)
        except ArgumentError:
            lease.release()
            raise
        row.lease = lease
        return Admission.READY

    def _chain_start(self, row: Row) -> bytes:
        return salt(self._secret, None if row.lease is None else row.lease.version.version)

    def _take(self, row: Row, choice: Choice) -> Tokens:
        """Give a row its next token, and end it where that ends it."""
        if choice.error is not None:
            return self._end(row, "error", error=choice.error)
        if choice.token in row.generation.params.stop_token_ids:
            return self._end(row, "stop", stop_token=choice.token)
        if choice.token in row.ends:
            return self._end(row, "stop")
        row.tokens.append(choice.token)
        self._generated += 1
        logprobs = () if choice.logprob is None else (choice.logprob,)
        new = Tokens(row.generation.request_id, row.index, (choice.token,), logprobs)
        if row.generated < row.generation.params.max_tokens:
            return new
        return replace(new, finish_reason=self._end(row, "length").finish_reason)

    def _end(self, row: Row, reason: str, **fields: Any) -> Tokens:
        self.scheduler.remove(row)
        request = row.generation.request_id
        rows = self._rows[request]
        rows.remove(row)
        if not rows:
            del self._rows[request]
        return Tokens(request, row.index, (), finish_reason=reason, **fields)

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._steps += 1
        self._computed += sum(piece.count for piece in pieces)
        self._batch = len(pieces)
        self._mix = len({piece.row.prompt for piece in pieces})


def _is_token(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _slice(piece: Piece) -> Slice:
    row, first = piece.row, piece.row.computed
    extent = None if row.lease is None else row.lease.extent
    return Slice(row.tokens[first : first + piece.count], first, row.blocks, extent, piece.complete, row.tokens)
