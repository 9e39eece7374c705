"""The whole server under load, on the CPU: hundreds of tenants over the embedded backbone, through HTTP.

Clients ask in a closed loop; who they are follows Zipf's law. In turn, all in one run:

    prompts      every request under its tenant's own prefix prompt
    no prompts   the same requests to the bare backbone, on the same server
    peft         the same tenants as PEFT adapters behind the same HTTP face, one adapter active at a time

A check first: answers under prompts are those of `PromptedModel.generate`, and PEFT gives the same. Then no request may
fail, the server's memory may not grow, and throughput is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import load_servers, options, session, tenants
from bench.load_client import Answer, Traffic, ask, completion, load
from bench.load_servers import Running
from bench.measure import CheckFailed, Journal, Spread
from bench.outcome import VERDICTS, Target
from bench.tenants import NAME, TEXTS

_SETTLED = 0.25  # share of the run after which memory must not grow
_GROWTH = Target(at_most=1.02)


@dataclass(frozen=True)
class Plan:
    """How much load; slices of `slice_seconds` go to every kind of request in turn until `seconds` are over."""

    seconds: float
    tenants: int
    clients: int
    new: int
    slice_seconds: float
    peft: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench serve`."""
    for flag, kind, default, about in (
        ("--seconds", float, 600.0, "how long load lasts, all in all"),
        ("--slice", float, 10.0, "seconds of one kind of requests at a time"),
        ("--tenants", int, 1000, "prompts that are asked for"),
        ("--clients", int, 32, "connections that ask"),
        ("--new", int, 16, "tokens of an answer"),
    ):
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=f"{about} (default: {default:g})")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    options.add(parser, "quick", "threads", "out")


def run(args: argparse.Namespace) -> int:
    """Runs it and prints a table; 1 where a check failed or a target was missed."""
    plan = Plan(args.seconds, args.tenants, args.clients, args.new, args.slice, not args.no_peft)
    if args.quick:
        plan = Plan(6.0, 8, 4, 4, 1.0, plan.peft)
    with session.opened(args, "serving-load", plan=asdict(plan)) as journal, TemporaryDirectory() as folder:
        try:
            return int(asyncio.run(_run(plan, Path(folder), args.threads, journal, not args.quick)))
        except CheckFailed as error:
            session.red(journal, error, case="load")
            return 1


async def _run(plan: Plan, folder: Path, threads: int, journal: Journal, judged: bool) -> bool:
    names = tenants.save(folder / "prompts", plan.tenants, peft=folder / "peft")
    with ExitStack() as stack:
        ours = stack.enter_context(load_servers.server(load_servers.ours, folder, threads))
        ports = {"prompts": ours, "no prompts": ours}
        if plan.peft:
            ports["peft"] = stack.enter_context(load_servers.server(load_servers.peft, folder, threads))
        await check(folder, names, ports, plan.new, "load", journal)
        kinds = {
            kind: Traffic([NAME] * len(names) if kind == "no prompts" else names, TEXTS, plan.new) for kind in ports
        }
        answers: dict[str, list[list[Answer]]] = {kind: [] for kind in kinds}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        memory: list[tuple[float, int]] = []
        end = time.monotonic() + plan.seconds
        while time.monotonic() < end:
            for kind, traffic in kinds.items():
                began = time.monotonic()
                answers[kind].append(await load(ports[kind].port, traffic, plan.clients, plan.slice_seconds))
                seconds[kind].append(time.monotonic() - began)
            memory.append((plan.seconds - (end - time.monotonic()), ours.memory()))
    return _report(answers, seconds, memory, journal, judged)


async def check(
    folder: Path, names: Sequence[str], ports: Mapping[str, Running], new: int, case: str, journal: Journal
) -> None:
    """Answers through HTTP are those of `PromptedModel.generate`, from every kind of server."""
    chosen = [names[i * 7 % len(names)] for i in range(len(TEXTS))]
    expected, compared = tenants.answers(folder / "prompts", [NAME, *chosen], new), 0
    for name, text in zip(chosen, TEXTS, strict=True):
        for kind, running in ports.items():
            asked = NAME if kind == "no prompts" else name
            answer, want = await _once(running.port, completion(asked, text, new)), expected[asked, text]
            if answer.error or answer.text != want:
                raise CheckFailed(f"{kind}: {asked} answers {answer.error or answer.text!r}, expected {want!r}")
            compared += 1
    what = "answers of generate through HTTP, " + ", ".join(ports)
    journal.write("check", case=case, green=True, what=what, compared=compared)
    print(f"green: {what}: {compared} compared, all equal", flush=True)


async def _once(port: int, body: dict[str, Any]) -> Answer:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        return await ask(reader, writer, body)
    finally:
        writer.close()


def _report(
    answers: dict[str, list[list[Answer]]],
    seconds: dict[str, list[float]],
    memory: Sequence[tuple[float, int]],
    journal: Journal,
    judged: bool,
) -> bool:
    rates: dict[str, list[float]] = {}
    missed = False
    for kind, slices in answers.items():
        rates[kind] = [sum(a.tokens for a in s) / t for s, t in zip(slices, seconds[kind], strict=True)]
        missed |= tell(journal, kind, [a for s in slices for a in s], rates[kind])
    over = Target(at_least=0.9)
    missed |= judge(journal, judged, "load", "prompts / no prompts", rates["prompts"], rates["no prompts"], over)
    if "peft" in rates:
        over = Target(at_least=5.0)
        missed |= judge(journal, judged, "load", "prompts / peft", rates["prompts"], rates["peft"], over)
    settled = [size for at, size in memory if at >= _SETTLED * memory[-1][0]]
    middle = len(settled) // 2 or 1
    early, late = settled[:middle], settled[middle:] or settled
    journal.write("memory", samples=memory)
    base = [statistics.median(early)] * len(late)
    return missed | judge(journal, judged, "load", "memory, second half / first", late, base, _GROWTH)


def tell(journal: Journal, kind: str, answers: Sequence[Answer], rates: Sequence[float]) -> bool:
    """Writes and prints what one kind of requests was answered with, `rates` tokens a second; whether any failed."""
    errors = [a.error for a in answers if a.error]
    first = sorted(a.first for a in answers if not a.error)
    line: dict[str, Any] = {
        "requests": len(answers),
        "errors": len(errors),
        "tokens_per_second": asdict(Spread.of(rates)),
        "first_token_p50": statistics.median(first),
        "first_token_p99": first[int(0.99 * (len(first) - 1))],
        "distinct": len({a.model for a in answers}),
    }
    journal.write("load", kind_of_request=kind, **line)
    print(
        f"{kind:22} {len(answers):7} requests of {line['distinct']} models, {len(errors)} errors, "
        f"{statistics.median(rates):8.0f} tokens/s, first token p50 {1e3 * line['first_token_p50']:.0f} ms, "
        f"p99 {1e3 * line['first_token_p99']:.0f} ms"
    )
    for error in errors[:3]:
        print(f"  {error}")
    return bool(errors)


def judge(
    journal: Journal,
    judged: bool,
    case: str,
    what: str,
    over: Sequence[float],
    under: Sequence[float],
    target: Target | None,
) -> bool:
    """Writes and prints a ratio, slice by slice; whether its target was missed."""
    ratio = Spread.of([a / b for a, b in zip(over, under, strict=True)])
    verdict = target.holds(ratio.median) if judged and target else None
    goal = target and target.describe()
    journal.write("ratio", case=case, what=what, value=asdict(ratio), target=goal, met=verdict)
    print(
        f"{what}: {ratio.median:.3f}x [{ratio.p20:.3f}, {ratio.p80:.3f}]"
        f"{f'  target {goal}' if goal else ''}{VERDICTS[verdict]}"
    )
    return verdict is False
