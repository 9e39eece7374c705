"""Async engines for tests: over the tiny backbone, and over a stand-in that only repeats."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from serving_cases import engine

from fastprompt.serving.async_engine import AsyncEngine
from fastprompt.serving.request import Tokens


class Numbers:
    """Tokens as text: their numbers."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(f"{token} " for token in tokens)


def serve(folder, test, **options):
    """Run an async function with a started engine."""

    async def main():
        limits = {"max_queued": options.pop("max_queued")} if "max_queued" in options else {}
        made = AsyncEngine(lambda: engine(folder, **options), Numbers(), "tiny", **limits)
        await made.start()
        try:
            return await test(made)
        finally:
            await made.close()
            assert not made.alive

    return asyncio.run(main())


async def text_of(engine, request):
    deltas = [delta async for delta in engine.generate(request)]
    return "".join(d.text for d in deltas), deltas


class StandIn:
    """An engine without a backbone: every row repeats its last token to its end, one token a step."""

    steps = 0
    residency = SimpleNamespace(close=lambda: None)

    def __init__(self):
        self.rows = {}

    @property
    def waits(self):
        return bool(self.rows)

    def stats(self):
        return None

    def check(self, generation):
        pass

    def add(self, generation):
        self.rows[generation.request_id] = [generation.token_ids[-1], generation.params.max_tokens]

    def cancel(self, request_id, index=None):
        found = self.rows.pop(request_id, None)
        return [] if found is None else [Tokens(request_id, 0, (), finish_reason="abort")]

    def step(self):
        self.steps += bool(self.rows)
        events = []
        for name, row in list(self.rows.items()):
            row[1] -= 1
            if not row[1]:
                del self.rows[name]
            events.append(Tokens(name, 0, (row[0],), finish_reason=None if row[1] else "length"))
        return events
