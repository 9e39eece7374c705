"""The Ray Serve application on this machine: which replica answers whom, and a replica killed under load.

Tenants over the embedded backbone ask in a closed loop, drawn by Zipf's law, every other request streamed. Each answer
is compared with that of `PromptedModel.generate`. Three phases:

    before    two replicas; each tenant's share of requests at its most frequent replica
    kill      one replica gets SIGKILL in the midst; what fails, what is answered wrongly, and how many streams it had
              begun that another went on with
    after     two replicas again

Runs where Ray is installed: `.venv-ray` of `make test-ray`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastprompt as fp
from bench import options, session, tenants
from bench.load_client import Traffic
from bench.measure import CheckFailed, Journal
from bench.outcome import VERDICTS, Target
from bench.tenants import NAME, TEXTS

TITLE = b"ray::ServeReplica:default:Replica"
_METHODS = (tenants.PREFIX, fp.PromptTuning(num_virtual_tokens=8))
_AFFINITY = Target(at_least=0.95)
_NOTICED = 2.0  # seconds until fronts know of a replica that runs
_STARTS = 5  # of Ray
_MOMENT = 0.05  # seconds for what a killed process had sent to arrive
_KILL_AT = 0.3  # share of a phase's requests that are answered when the replica is killed


@dataclass(frozen=True)
class Plan:
    """How much is asked: `requests` in each phase, of `new` tokens, by `clients` at a time."""

    requests: int
    tenants: int
    clients: int
    new: int
    fronts: int = 2


@dataclass
class Phase:
    """What came of a phase: the replicas that answered, by tenant, and what went wrong."""

    victim: str | None = None
    replicas: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    requests: int = 0
    streamed: int = 0
    killed_at: float = 0.0
    resumed: int = 0  # streams that the replica began which was killed, and that ended after it
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    slowest: float = 0.0

    def affinity(self) -> float:
        """The share of requests that came to their tenant's most frequent replica."""
        counts = self.replicas.values()
        return sum(max(c.values()) for c in counts) / max(1, sum(sum(c.values()) for c in counts))

    def busiest(self) -> str:
        """The replica that answered most."""
        return sum(self.replicas.values(), Counter[str]()).most_common(1)[0][0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench ray-replicas`."""
    for flag, default, about in (
        ("--requests", 200, "requests of a phase"),
        ("--tenants", 40, "prompts that are asked for"),
        ("--clients", 16, "requests at a time"),
        ("--new", 48, "tokens of an answer"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default: {default})")
    options.add(parser, "quick", "out")


def run(args: argparse.Namespace) -> int:
    """Runs it and prints a table; 1 where a request failed, an answer was wrong or the target was missed."""
    plan = Plan(args.requests, args.tenants, args.clients, args.new)
    if args.quick:
        plan = Plan(80, 16, 8, 48, fronts=1)
    with session.opened(args, "ray-replicas", plan=vars(plan)) as journal, TemporaryDirectory() as folder:
        try:
            phases = run_phases(plan, Path(folder))
        except CheckFailed as error:
            session.red(journal, error, case="replicas")
            return 1
        return int(_report(phases, journal, judge=not args.quick))


def run_phases(plan: Plan, folder: Path) -> dict[str, Phase]:
    """All phases, over a cluster of their own."""
    expected = tenants.answers(folder, save_tenants(folder, plan.tenants), plan.new)
    with cluster(folder, plan) as url:
        phases = {"before": asyncio.run(ask_all(url, plan, expected))}
        busiest = phases["before"].busiest()
        phases["kill"] = asyncio.run(ask_all(url, plan, expected, busiest))
        wait_for_replicas(2, without=busiest)
        phases["after"] = asyncio.run(ask_all(url, plan, expected))
    return phases


def save_tenants(folder: Path, count: int) -> list[str]:
    """Prompts of two methods; their names."""
    return tenants.save(folder, count, _METHODS)


@contextmanager
def cluster(folder: Path, plan: Plan) -> Iterator[str]:
    """The application on a cluster of this machine, until the block ends; its address."""
    import ray
    from ray import serve

    from fastprompt.integrations.ray import build_app

    try:
        _start_ray()
        port = _free_port()
        serve.start(http_options={"port": port})
        small = {"max_model_len": 256, "bank_bytes": "64M", "num_fronts": plan.fronts}
        serve.run(build_app(NAME, folder, num_replicas=2, options={"ray_actor_options": {"num_cpus": 0}}, **small))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def _start_ray() -> None:
    """Ray gives a node half a minute to start, which a busy machine may not keep."""
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise


async def ask_all(url: str, plan: Plan, expected: Mapping[tuple[str, str], str], victim: str | None = None) -> Phase:
    """A phase; the replica `victim` is killed when some of its requests are answered."""
    import httpx

    phase, traffic = Phase(victim), Traffic(sorted({name for name, _ in expected}), TEXTS, plan.new)
    left = iter(range(plan.requests))
    limits = httpx.Limits(max_connections=plan.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one() -> None:
            for i in left:
                await _ask(client, traffic.body(), bool(i % 2), phase, expected)
                if victim is not None and phase.requests == int(_KILL_AT * plan.requests):
                    phase.killed_at = time.monotonic()
                    os.kill(replicas()[victim], signal.SIGKILL)

        await asyncio.gather(*(one() for _ in range(plan.clients)))
    return phase


async def _ask(client: Any, body: dict[str, Any], streams: bool, phase: Phase, expected: Mapping[Any, str]) -> None:
    if not streams:
        body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    began = time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            text = (await response.aread()).decode()
        found = _text(text, streams) if response.status_code == 200 else None
    except Exception as error:  # a connection that broke, an event that is an error
        found, text = None, repr(error)
    phase.requests += 1
    phase.streamed += streams
    phase.slowest = max(phase.slowest, time.monotonic() - began)
    if found is None:
        phase.failed.append(text)
        return
    phase.wrong += found != expected[body["model"], body["prompt"]]
    replica = response.headers["x-fastprompt-replica"]
    phase.replicas[body["model"]][replica] += 1
    if streams and replica == phase.victim and time.monotonic() > phase.killed_at + _MOMENT:
        phase.resumed += bool(phase.killed_at)


def _text(answer: str, streams: bool) -> str | None:
    """An answer's text; None for a stream that did not come to its end."""
    if not streams:
        return json.loads(answer)["choices"][0]["text"]
    *events, last, _ = answer.split("\n\n")
    read = [json.loads(event.removeprefix("data: ")) for event in events]
    if last != "data: [DONE]" or any("error" in event for event in read):
        return None
    return "".join(choice["text"] for event in read for choice in event["choices"])


def replicas() -> dict[str, int]:
    """Process ids of the replicas that run engines here, by the names that are in their logs' names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(TITLE):
                opened = " ".join(os.readlink(link) for link in (process / "fd").iterdir())
                found[re.findall(r"replica_default_Replica_(\w+)\.log", opened)[0]] = int(process.name)
        except (OSError, IndexError):  # it ends, or begins
            continue
    return found


def wait_for_replicas(count: int, without: str, seconds: float = 600.0) -> None:
    """Until so many replicas run, and not one of this name. Errors: CheckFailed."""
    from ray import serve

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = serve.status().applications["default"].deployments["Replica"].replica_states
        if len(set(replicas()) - {without}) == count and states == {"RUNNING": count}:
            time.sleep(_NOTICED)
            return
        time.sleep(0.5)
    raise CheckFailed(f"{count} replicas were not running again within {seconds:g} s: {states}")


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _report(phases: Mapping[str, Phase], journal: Journal, judge: bool) -> bool:
    missed = False
    for name, phase in phases.items():
        verdict = _AFFINITY.holds(phase.affinity()) if judge and name != "kill" else None
        missed |= bool(phase.failed) or bool(phase.wrong) or verdict is False
        line = {
            "phase": name,
            "requests": phase.requests,
            "streamed": phase.streamed,
            "failed": len(phase.failed),
            "wrong": phase.wrong,
            "resumed": phase.resumed,
            "tenants": len(phase.replicas),
            "replicas": len({replica for counts in phase.replicas.values() for replica in counts}),
            "affinity": phase.affinity(),
            "slowest": phase.slowest,
            "met": verdict,
        }
        journal.write("replicas", **line)
        print(
            f"{name:7} {line['requests']} requests of {line['tenants']} tenants, {line['failed']} failed, "
            f"{line['wrong']} wrong, {line['resumed']} streams resumed, {line['replicas']} replicas, "
            f"affinity {line['affinity']:.3f}{VERDICTS[verdict]}, slowest {phase.slowest:.1f} s"
        )
        for error in phase.failed[:3]:
            print(f"  {error}")
    return missed
