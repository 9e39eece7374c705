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
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fastprompt as fp
from bench import machine, options
from bench.load_client import Answer, Traffic, ask, completion, load
from bench.measure import CheckFailed, Journal, Spread
from bench.outcome import VERDICTS, Target
from fastprompt import demo

NAME = "embedded"
_INIT_STD = 0.5  # of random prefixes: about the size of the backbone's own keys and values
_VIRTUAL = 16
_MAX_ROWS = 64
_SETTLED = 0.25  # share of the run after which memory must not grow
_GROWTH = Target(at_most=1.02)
TEXTS = ("Anna lives in", "The capital of", "Tom works as a", "Where does", "One cat, two", "The language of")


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
    """The options of `python -m bench serving-load`."""
    parser.add_argument("--seconds", type=float, default=600.0, help="how long load lasts, all in all (default: 600)")
    parser.add_argument("--slice", type=float, default=10.0, help="seconds of one kind of requests at a time")
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32, help="connections that ask (default: 32)")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (default: 16)")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    options.add(parser, "quick", "threads", "out")


def run(args: argparse.Namespace) -> int:
    """Runs it and prints a table; 1 where a check failed or a target was missed."""
    plan = Plan(args.seconds, args.tenants, args.clients, args.new, args.slice, not args.no_peft)
    if args.quick:
        plan = Plan(6.0, 8, 4, 4, 1.0, plan.peft)
    with args.out.open("a") if args.out else nullcontext() as out, TemporaryDirectory() as folder:
        journal = Journal(out)
        journal.write("machine", benchmark="serving-load", quick=args.quick, plan=asdict(plan), **machine.facts())
        try:
            return int(asyncio.run(_run(plan, Path(folder), args.threads, journal, judge=not args.quick)))
        except CheckFailed as error:
            journal.write("check", case="load", green=False, error=str(error))
            print(f"CHECK FAILED, no ratios: {error}", file=sys.stderr)
            return 1


async def _run(plan: Plan, folder: Path, threads: int, journal: Journal, judge: bool) -> bool:
    tenants = save_tenants(folder, plan.tenants)
    with ExitStack() as stack:
        ours = stack.enter_context(server(_serve_ours, folder, threads))
        ports = {"prompts": ours, "no prompts": ours}
        if plan.peft:
            ports["peft"] = stack.enter_context(server(_serve_peft, folder, threads))
        await _check(folder, tenants, ports, plan.new, journal)
        kinds = {
            kind: Traffic([NAME] * len(tenants) if kind == "no prompts" else tenants, TEXTS, plan.new) for kind in ports
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
    return _report(answers, seconds, memory, journal, judge)


# servers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    port: int
    pid: int

    def memory(self) -> int:
        """Resident bytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextlib.contextmanager
def server(target: Any, folder: Path, threads: int) -> Iterator[Running]:
    """Run a server on a free port until the block ends."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, folder, threads), daemon=True)
    process.start()
    try:
        if not here.poll(600):
            raise CheckFailed("a server did not start within ten minutes")
        assert process.pid is not None
        yield Running(here.recv(), process.pid)
    finally:
        process.terminate()
        process.join(60)
        process.kill()


def _serve_ours(pipe: Connection, folder: Path, threads: int) -> None:
    from fastprompt.serving.async_engine import AsyncEngine
    from fastprompt.serving.build import EngineOptions, build_engine
    from fastprompt.serving.scheduler import Rules

    def build() -> Any:
        torch.set_num_threads(threads)
        return build_engine(demo.backbone(), folder / "prompts", EngineOptions(rules=Rules(max_rows=_MAX_ROWS)))

    _serve(AsyncEngine(build, demo.tokenizer(), NAME), pipe)


def _serve_peft(pipe: Connection, folder: Path, threads: int) -> None:
    from bench.peft_engine import PeftEngine
    from fastprompt.integrations.transformers.probe import inspect_backbone
    from fastprompt.serving.registry import PromptRegistry

    torch.set_num_threads(threads)
    registry = PromptRegistry(folder / "prompts", inspect_backbone(demo.backbone()).spec)
    adapters = {name: folder / "peft" / name for name in registry.names()}
    _serve(PeftEngine(demo.backbone(), adapters, demo.tokenizer(), NAME, registry, _MAX_ROWS), pipe)


def _serve(engine: Any, pipe: Connection) -> None:
    """Serve on a free port, and say which once the engine is there."""
    import uvicorn

    from fastprompt.serving.http import create_app

    config = uvicorn.Config(create_app(engine), port=0, log_level="warning", access_log=False)
    running = uvicorn.Server(config)

    async def main() -> None:
        task = asyncio.create_task(running.serve())
        while not (running.started and engine.alive and engine.ready):
            if task.done():
                task.result()
                return
            await asyncio.sleep(0.05)
        pipe.send(running.servers[0].sockets[0].getsockname()[1])
        await task

    asyncio.run(main())


def save_tenants(folder: Path, count: int) -> list[str]:
    """Random prefix prompts, each its own, in our format and in PEFT's."""
    model = fp.PromptedModel(demo.backbone())
    names = [f"tenant-{i:04}" for i in range(count)]
    for i, name in enumerate(names):
        model.add_prompt(name, fp.PrefixTuning(num_virtual_tokens=_VIRTUAL, init_std=_INIT_STD), seed=i)
        model.save_prompt(name, folder / "prompts" / name)
        model.save_prompt(name, folder / "peft" / name, format="peft")
        model.remove_prompt(name)
    return names


# check and report ----------------------------------------------------------------------------------------------------


async def _check(folder: Path, tenants: Sequence[str], ports: dict[str, Running], new: int, journal: Journal) -> None:
    """Answers through HTTP are those of `PromptedModel.generate`, from us and from PEFT."""
    tokenizer, model = demo.tokenizer(), fp.PromptedModel(demo.backbone())
    compared = 0
    for i, text in enumerate(TEXTS):
        name = tenants[i * 7 % len(tenants)]
        model.load_prompt(name, folder / "prompts" / name)
        ids = torch.tensor([tokenizer(text).input_ids])
        for kind, asked in ((kind, NAME if kind == "no prompts" else name) for kind in ports):
            prompt = None if asked == NAME else asked
            out = model.generate(ids, prompts=prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            answer = await _once(ports[kind].port, completion(asked, text, new))
            if answer.error or answer.text != expected:
                raise CheckFailed(f"{kind}: {asked} answers {answer.error or answer.text!r}, expected {expected!r}")
            compared += 1
        model.remove_prompt(name)
    journal.write("check", case="load", green=True, what="answers of generate, fastprompt and PEFT", compared=compared)
    print(f"green: answers of generate through HTTP: {compared} compared, all equal", flush=True)


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
    judge: bool,
) -> bool:
    rates: dict[str, list[float]] = {}
    failed = 0
    for kind, slices in answers.items():
        rates[kind] = [sum(a.tokens for a in s) / t for s, t in zip(slices, seconds[kind], strict=True)]
        every = [a for s in slices for a in s]
        errors = [a.error for a in every if a.error]
        failed += len(errors)
        first = sorted(a.first for a in every if not a.error)
        line = {
            "requests": len(every),
            "errors": len(errors),
            "tokens_per_second": asdict(Spread.of(rates[kind])),
            "first_token_p50": statistics.median(first),
            "first_token_p99": first[int(0.99 * (len(first) - 1))],
            "distinct": len({a.model for a in every}),
        }
        journal.write("load", kind_of_request=kind, **line)
        print(
            f"{kind:11} {len(every):7} requests of {line['distinct']} models, {len(errors)} errors, "
            f"{statistics.median(rates[kind]):8.0f} tokens/s, first token p50 {1e3 * line['first_token_p50']:.0f} ms, "
            f"p99 {1e3 * line['first_token_p99']:.0f} ms"
        )
        for error in errors[:3]:
            print(f"  {error}")
    missed = failed > 0
    missed |= _judge(
        journal, judge, "prompts / no prompts", rates["prompts"], rates["no prompts"], Target(at_least=0.9)
    )
    if "peft" in rates:
        missed |= _judge(journal, judge, "prompts / peft", rates["prompts"], rates["peft"], Target(at_least=5.0))
    settled = [size for at, size in memory if at >= _SETTLED * memory[-1][0]]
    middle = len(settled) // 2 or 1
    early, late = settled[:middle], settled[middle:] or settled
    journal.write("memory", samples=memory)
    return missed | _judge(
        journal, judge, "memory, second half / first", late, [statistics.median(early)] * len(late), _GROWTH
    )


def _judge(
    journal: Journal, judge: bool, what: str, over: Sequence[float], under: Sequence[float], target: Target
) -> bool:
    ratio = Spread.of([a / b for a, b in zip(over, under, strict=True)])
    verdict = target.holds(ratio.median) if judge else None
    journal.write("ratio", case="load", what=what, value=asdict(ratio), target=target.describe(), met=verdict)
    print(
        f"{what}: {ratio.median:.3f}x [{ratio.p20:.3f}, {ratio.p80:.3f}]  target {target.describe()}{VERDICTS[verdict]}"
    )
    return verdict is False
