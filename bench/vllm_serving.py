"""Prompts inside vLLM, on the CPU: against vLLM without any, and thousands of prompts over one small cache.

resident  rows under prompts whose pages are in the cache, in vLLM with the connector, against the same number of tokens
          in vLLM without it, whose first tokens are in its cache as well: one stream of rows a round, texts never seen
          before
tails     the same with prompts that fill no whole pages: what is left over is written again for every row
zipf      2,000 prompts, 20,000 requests, prompts drawn by Zipf's law: memory over time, how often a prompt is written
          again, how long that takes

It runs in the environment of `make test-vllm`, where vLLM is: .venv-vllm/bin/python -m bench vllm-serving.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import measure, memory, outcome
from bench.backbones import LlamaSize
from bench.measure import Agreement, CheckFailed, Contestant, Journal, Spread
from bench.outcome import Outcome, Target
from bench.vllm_setting import PAGE, Setting, Size, setting
from fastprompt.integrations.vllm import PromptedInputs
from fastprompt.integrations.vllm.loads import Load

_CHECKED = 32  # requests of the stream whose answers are looked at

LARGE = LlamaSize(8, 1024, 16, 4, 2816)
SMALL = LlamaSize(4, 256, 4, 2, 704)
RESIDENT = Size(LARGE)
TAILS = Size(LARGE, lengths=(20, 50, 100))
ZIPF = Size(SMALL, lengths=(16, 32, 64), prompts=2000, rows=500, text=16, new=8, cache=64 << 20, requests=20_000)
TINY = LlamaSize(2, 64, 2, 1, 128, 200)
QUICK = Size(TINY, prompts=3, rows=4, text=5, new=3, rounds=2, cache=4 << 20, requests=40)


def against_plain(name: str, size: Size, rounds: int, target: float | None) -> Outcome:
    """Rows under prompts in vLLM with the connector, against as many tokens in vLLM without."""
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    with setting(size) as made:
        plain = made.engine(prompted=False)
        ours = made.engine(prompted=True)
        connector = state._KV_CONNECTOR_AGENT  # of the process: each engine runs with its own
        inputs, draw = PromptedInputs.of(ours), random.Random(0)
        heads = {n: _tokens(draw, size, made.store.current(n).length) for n in made.names}
        names = [made.names[i % size.prompts] for i in range(size.rows)]
        turns: dict[str, int] = {"plain": 0, "ours": 0}

        def texts(who: str) -> list[list[int]]:
            turns[who] += 1
            fresh = random.Random(turns[who])
            return [_tokens(fresh, size, size.text) for _ in names]

        def run_plain() -> torch.Tensor:
            state._KV_CONNECTOR_AGENT = None
            return _answers(
                plain, [{"prompt_token_ids": heads[n] + t} for n, t in zip(names, texts("plain"), strict=True)], size
            )

        def run_ours() -> torch.Tensor:
            state._KV_CONNECTOR_AGENT = connector
            return _answers(ours, [inputs(n, t) for n, t in zip(names, texts("ours"), strict=True)], size)

        check = Agreement("greedy tokens under prompts, vLLM's and transformers'")
        for turn in range(1, 3):  # the first brings prompts and heads into the caches
            said = run_ours()
            run_plain()
            fresh = random.Random(turn)
            for row, prompt in enumerate(names[: len(made.names)]):
                check.equal(
                    said[row].double(), torch.tensor(made.expected(prompt, _tokens(fresh, size, size.text))).double()
                )
        contestants = {
            "vLLM, no prompts": Contestant(run_plain, _ignore),
            "vLLM with prompts": Contestant(run_ours, _ignore),
        }
        samples = measure.interleave(contestants, rounds, crowded=True)
        state._KV_CONNECTOR_AGENT = None  # the next case makes its own
    base, mine = contestants
    goal = None if target is None else Target(at_least=target)
    return Outcome(name, samples, (check,), [(measure.ratio(samples, base, mine), goal)])


def zipf_case(size: Size, journal: Journal) -> bool:
    """The stream; whether memory grew. Everything it measures is in the journal and printed."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    with setting(size) as made:
        llm = made.engine(prompted=True)
        inputs, writer = PromptedInputs.of(llm), get_kv_transfer_group().writer
        draw = random.Random(0)
        drawn = draw.choices(made.names, [1 / (i + 1) for i in range(size.prompts)], k=size.requests)
        texts = [_tokens(draw, size, size.text) for _ in drawn]
        held, begin, checked = [], time.perf_counter(), 0
        for first in range(0, size.requests, size.rows):
            rows = range(first, min(first + size.rows, size.requests))
            said = _answers(llm, [inputs(drawn[i], texts[i]) for i in rows], size)
            held.append(memory.status("RssAnon", "RssFile"))
            if first == 0 or checked < _CHECKED:
                if said[0].tolist() != made.expected(drawn[first], texts[first]):
                    raise CheckFailed(
                        f"request {first} under {drawn[first]} is answered otherwise than by transformers"
                    )
                checked += 1
        seconds, stats = time.perf_counter() - begin, writer.stats
        virtual = sum(made.store.current(name).length for name in drawn)
        facts = {
            "prompts": size.prompts,
            "asked for": len(set(drawn)),
            "requests": size.requests,
            "seconds": seconds,
            "requests a second": size.requests / seconds,
            "loads a request": stats.loads / size.requests,
            "virtual tokens written again": stats.tokens / virtual,
            "files mapped": stats.mapped,
            "failed": stats.failed,
            "share of the time spent loading": stats.seconds / seconds,
            "answers checked": checked,
        }
        cold, hot = _load_times(made, llm, writer)
    quarter = len(held) // 4
    anonymous = [m["RssAnon"] for m in held]
    growth = max(anonymous[-quarter:]) / max(anonymous[quarter : 2 * quarter]) if quarter else 1.0
    journal.write("zipf", case="zipf", **facts, memory=held, growth=growth, cold_load=vars(cold), hot_load=vars(hot))
    for what, value in facts.items():
        print(f"  {what:34} {value:12,.3f}" if isinstance(value, float) else f"  {what:34} {value:12,}")
    print(f"  first load of a prompt: {cold.median * 1e3:.2f} ms [{cold.p20 * 1e3:.2f}, {cold.p80 * 1e3:.2f}]")
    print(f"  load of one read before: {hot.median * 1e3:.2f} ms [{hot.p20 * 1e3:.2f}, {hot.p80 * 1e3:.2f}]")
    print(f"  anonymous memory: {anonymous[0] >> 20} MiB after the first rows, {anonymous[-1] >> 20} at the end")
    print(f"  last quarter over the second one: {growth:.3f}x  target <= 1.02x")
    return growth > 1.02


def _load_times(made: Setting, llm: Any, writer: Any, count: int = 200) -> tuple[Spread, Spread]:
    """Seconds to write one whole prompt into pages: with its file to be mapped and checked first, and without."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    seconds: tuple[list[float], list[float]] = ([], [])
    for name in made.names[:count]:
        ticket = made.store.current(name).ticket
        writer.prefixes._held.clear()
        load = Load(ticket, 0, ticket.length, tuple(range(1, 1 + -(-ticket.length // PAGE))))
        for taken in seconds:
            begin = time.perf_counter()
            if writer.write([load], context):
                raise CheckFailed(f"{name} could not be loaded")
            taken.append(time.perf_counter() - begin)
    llm.reset_prefix_cache()
    return Spread.of(seconds[0]), Spread.of(seconds[1])


def _tokens(draw: random.Random, size: Size, count: int) -> list[int]:
    return [draw.randrange(1, size.backbone.vocabulary - 40) for _ in range(count)]


def _answers(llm: Any, inputs: list[dict[str, Any]], size: Size) -> torch.Tensor:
    """New tokens `[rows, new]`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=size.new, ignore_eos=True, detokenize=False)
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return torch.tensor([list(output.outputs[0].token_ids) for output in outputs])


def _ignore(result: Any) -> None:
    """Texts differ from round to round: answers are checked before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench vllm-serving`."""
    outcome.add_arguments(parser, ["resident", "tails", "zipf"])
    parser.add_argument("--requests", type=int, help="of the stream of case zipf (default: 20,000)")


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints a table; 1 where a check failed or a target (full size, quiet machine) was missed."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("FASTPROMPT_VLLM_SECRET", secrets.token_hex(32))

    def compared(name: str, size: Size, target: float | None) -> Callable[[Journal], bool]:
        size = replace(QUICK, lengths=size.lengths) if args.quick else size
        rounds = args.rounds or size.rounds
        return lambda journal: against_plain(name, size, rounds, target).report(journal, judge=not args.quick)

    def stream(journal: Journal) -> bool:
        size = QUICK if args.quick else ZIPF
        grew = zipf_case(replace(size, requests=args.requests or size.requests), journal)
        return grew and not args.quick

    cases = {"resident": compared("resident", RESIDENT, 0.95), "tails": compared("tails", TAILS, None), "zipf": stream}
    return outcome.run_cases("vllm-serving", LARGE, cases, args)
