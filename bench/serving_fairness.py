"""Whether a tenant that floods the server takes the others' time: on the CPU, over the embedded backbone, through HTTP.

In turn, all in one run, every tenant under a prompt of its own:

    alone     a quiet tenant asks, one request after the other, and nobody else does
    beside    the same, while another tenant has several times more requests under way than run at once
    share     two tenants always have requests waiting, the second over three times as many connections

A check first: answers are those of `PromptedModel.generate`. Then no request may fail. The quiet tenant's first tokens
are compared with those that it gets alone and with those that the flood gets, which waits in its own queue; the tokens
that the two busy tenants were answered with are compared with each other.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import load_servers, options, session, tenants
from bench.load_client import Answer, Traffic, load
from bench.measure import CheckFailed, Journal
from bench.outcome import Target
from bench.serving_load import check, judge, tell
from bench.tenants import TEXTS

_CASE = "fairness"
_KINDS = {  # what is asked in each kind of slice, and by which tenant
    "alone": {"quiet, alone": "quiet"},
    "beside": {"quiet, beside a flood": "quiet", "flood": "flood"},
    "share": {"busy, few connections": "few", "busy, many connections": "many"},
}
_WAITS = Target(at_least=2.0)  # flood's first token over the quiet tenant's: it waits for itself
_SHARE = Target(at_least=0.9)


@dataclass(frozen=True)
class Asks:
    """How a tenant asks: over so many connections, answers of so many tokens."""

    connections: int
    new: int


@dataclass(frozen=True)
class Plan:
    """Which tenants there are, and how long slices of each kind last, in seconds; there are `rounds` of each."""

    rounds: int = 5
    alone: float = 10.0
    beside: float = 10.0
    share: float = 30.0
    quiet: Asks = Asks(1, 4)
    flood: Asks = Asks(192, 64)
    few: Asks = Asks(64, 16)
    many: Asks = Asks(192, 16)


_NAMES = ("quiet", "flood", "few", "many")
QUICK = Plan(1, 0.5, 0.5, 0.5, Asks(1, 2), Asks(8, 4), Asks(4, 2), Asks(8, 2))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench fairness`."""
    options.add(parser, "quick", "threads", "out", rounds=Plan.rounds)


def run(args: argparse.Namespace) -> int:
    """Runs it and prints a table; 1 where a check failed or a target was missed."""
    plan = QUICK if args.quick else Plan(args.rounds)
    with session.opened(args, "serving-fairness", plan=asdict(plan)) as journal, TemporaryDirectory() as folder:
        try:
            return int(asyncio.run(_run(plan, Path(folder), args.threads, journal, not args.quick)))
        except CheckFailed as error:
            session.red(journal, error, case=_CASE)
            return 1


async def _run(plan: Plan, folder: Path, threads: int, journal: Journal, judged: bool) -> bool:
    models = dict(zip(_NAMES, tenants.save(folder / "prompts", len(_NAMES)), strict=True))
    found: dict[str, list[list[Answer]]] = {kind: [] for asked in _KINDS.values() for kind in asked}
    with load_servers.server(load_servers.ours, folder, threads) as server:
        await check(folder, list(models.values()), {"prompts": server}, plan.few.new, _CASE, journal)
        for _ in range(plan.rounds):
            for name, asked in _KINDS.items():
                for kind, answers in (await _slice(server.port, plan, models, name, asked)).items():
                    found[kind].append(answers)
    return _report(found, plan, journal, judged)


async def _slice(
    port: int, plan: Plan, models: Mapping[str, str], name: str, asked: Mapping[str, str]
) -> dict[str, list[Answer]]:
    """What each kind of requests was answered with while all of a slice were asked."""
    seconds: float = getattr(plan, name)
    end = time.monotonic() + seconds

    def by(tenant: str) -> Coroutine[Any, Any, list[Answer]]:
        asks: Asks = getattr(plan, tenant)
        return load(port, Traffic([models[tenant]], TEXTS, asks.new), asks.connections, seconds)

    answered = zip(asked, await asyncio.gather(*map(by, asked.values())), strict=True)
    return {kind: [answer for answer in answers if answer.at <= end] or answers for kind, answers in answered}


def _report(found: dict[str, list[list[Answer]]], plan: Plan, journal: Journal, judged: bool) -> bool:
    missed = False
    rates, first = {}, {}
    seconds = {kind: getattr(plan, name) for name, asked in _KINDS.items() for kind in asked}
    for kind, slices in found.items():
        rates[kind] = [sum(answer.tokens for answer in answers) / seconds[kind] for answers in slices]
        first[kind] = [statistics.median(answer.first for answer in answers) for answers in slices]
        missed |= tell(journal, kind, [answer for answers in slices for answer in answers], rates[kind])
    for what, over, under, target in (
        ("first token, quiet beside a flood / alone", first["quiet, beside a flood"], first["quiet, alone"], None),
        ("first token, flood / quiet beside it", first["flood"], first["quiet, beside a flood"], _WAITS),
        ("tokens, few / many connections", rates["busy, few connections"], rates["busy, many connections"], _SHARE),
    ):
        missed |= judge(journal, judged, _CASE, what, over, under, target)
    return missed
