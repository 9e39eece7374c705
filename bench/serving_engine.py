"""The serving engine on the CPU, without HTTP: batching step by step against `generate` on the same rows.

large     8 layers of width 1024: 32 rows of 32 tokens, 32 new ones, in the engine with 7 prompts mixed in and without
          any, against transformers' own `generate` of the whole batch without prompts
small     the same with 4 layers of width 256, where what Python does counts most
registry  the same steps with 10 and with 100,000 prompts registered on disk
memory    the small case in memory for the own tokens of eight rows against memory for all 32
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import fastprompt as fp
from bench import measure, outcome
from bench.backbones import INIT_STD, LlamaSize, greedy, llama, random_text, twin
from bench.measure import Agreement, Contestant, Journal
from bench.outcome import NOISE, Outcome, Target
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.engine import Engine
from fastprompt.serving.request import Generation, SamplingParams
from fastprompt.serving.runner import PackedRunner

_VIRTUAL = 16
_BLOCK = 16  # tokens


@dataclass(frozen=True)
class Size:
    """How large a case is."""

    backbone: LlamaSize
    rows: int = 32
    text: int = 32
    new: int = 32
    prompts: int = 7
    few: int = 10
    many: int = 100_000
    rounds: int = 7


LARGE = Size(LlamaSize(8, 1024, 16, 4, 2816))
SMALL = Size(LlamaSize(4, 256, 4, 2, 704))
QUICK = Size(LlamaSize(2, 64, 4, 2, 128, 100), rows=4, text=5, new=4, prompts=3, many=50, rounds=2)


def generate_case(name: str, size: Size, rounds: int, at_least: float) -> Outcome:
    """All rows at once, to their ends."""
    bare = llama(size.backbone)
    text = random_text(size.backbone, size.rows, size.text)
    plain, mixed = Agreement("greedy tokens without prompts"), Agreement("greedy tokens with prompts")
    with TemporaryDirectory() as folder:
        names = _save_prompts(bare, Path(folder), size.prompts)
        rows = [[None, *names][i % (size.prompts + 1)] for i in range(size.rows)]
        prompted = fp.PromptedModel(twin(bare))
        for prompt in names:
            prompted.load_prompt(prompt, Path(folder) / prompt)
        mixed.check(prompted.generate(**text, prompts=rows, **greedy(size.new))[:, size.text :])
        engine = build_engine(twin(bare), folder, EngineOptions(max_model_len=256))
        contestants = {
            "generate, no prompts": Contestant(
                lambda: bare.generate(**text, **greedy(size.new))[:, size.text :], plain.check
            ),
            f"engine, {size.prompts} prompts": Contestant(lambda: _answers(engine, text, rows, size.new), mixed.check),
            "engine, no prompts": Contestant(lambda: _answers(engine, text, [None] * size.rows, size.new), plain.check),
        }
        for contestant in contestants.values():
            contestant.check(contestant.run())
        samples = measure.interleave(contestants, rounds)
        engine.residency.close()
    base, ours, ours_bare = contestants
    ratios = [
        (measure.ratio(samples, base, ours), Target(at_least=at_least)),
        (measure.ratio(samples, base, ours_bare), None),
    ]
    return Outcome(name, samples, (plain, mixed), ratios)


def registry_case(name: str, size: Size, rounds: int) -> Outcome:
    """The same rows under the same prompts, with few and with many names on disk, and with few again."""
    bare = llama(size.backbone)
    text = random_text(size.backbone, size.rows, size.text)
    tokens = Agreement("greedy tokens, few and many prompts registered")
    with TemporaryDirectory() as folder:
        folders = {count: Path(folder) / str(count) for count in (size.few, size.many)}
        names = _save_prompts(bare, folders[size.few], size.few)
        rows = [names[i % size.few] for i in range(size.rows)]
        shutil.copytree(folders[size.few], folders[size.many])
        for i in range(size.few, size.many):
            _link(folders[size.few] / names[i % size.few], folders[size.many] / f"other-{i}")
        engines = {n: build_engine(twin(bare), path, EngineOptions(max_model_len=256)) for n, path in folders.items()}

        def contestant(count: int) -> Contestant:
            return Contestant(lambda: _answers(engines[count], text, rows, size.new), tokens.check)

        small, large = f"{size.few} prompts", f"{size.many} prompts"
        again = f"{small}, again"
        contestants = {small: contestant(size.few), large: contestant(size.many), again: contestant(size.few)}
        for entry in contestants.values():
            entry.check(entry.run())
        samples = measure.interleave(contestants, rounds)
        for engine in engines.values():
            engine.residency.close()
    noise = measure.ratio(samples, again, small)
    target = Target(at_most=max(NOISE, noise.wall.p80))
    return Outcome(name, samples, (tokens,), [(measure.ratio(samples, large, small), target), (noise, None)])


def memory_case(name: str, size: Size, rounds: int) -> Outcome:
    """All rows at once, where few of them fit at a time: they wait, and some give way and are computed again."""
    bare = llama(size.backbone)
    text = random_text(size.backbone, size.rows, size.text)
    tokens = Agreement("greedy tokens, much and little memory")
    whole = -(-(size.text + size.new) // _BLOCK)  # blocks of a row at its end
    block = PackedRunner.block_bytes(inspect_backbone(twin(bare)), _BLOCK)
    with TemporaryDirectory() as folder:
        names = _save_prompts(bare, Path(folder), size.prompts)
        rows = [[None, *names][i % (size.prompts + 1)] for i in range(size.rows)]
        engines = {
            label: build_engine(
                twin(bare), folder, EngineOptions(max_model_len=256, kv_bytes=many * whole * block, block_size=_BLOCK)
            )
            for label, many in (("memory for all rows", size.rows), ("for a quarter", max(2, size.rows // 4)))
        }

        def contestant(engine: Engine) -> Contestant:
            return Contestant(lambda: _answers(engine, text, rows, size.new), tokens.check)

        contestants = {label: contestant(engine) for label, engine in engines.items()}
        for entry in contestants.values():
            entry.check(entry.run())
        samples = measure.interleave(contestants, rounds)
        for engine in engines.values():
            engine.residency.close()
    much, little = contestants
    return Outcome(name, samples, (tokens,), [(measure.ratio(samples, little, much), None)])


CASES: dict[str, Callable[[Size | None, int | None], Outcome]] = {
    "large": lambda size, rounds: generate_case("large", size or LARGE, rounds or LARGE.rounds, 0.95),
    "small": lambda size, rounds: generate_case("small", size or SMALL, rounds or SMALL.rounds, 0.85),
    "registry": lambda size, rounds: registry_case("registry", size or SMALL, rounds or SMALL.rounds),
    "memory": lambda size, rounds: memory_case("memory", size or SMALL, rounds or SMALL.rounds),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench serving-engine`."""
    outcome.add_arguments(parser, list(CASES))


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints a table; 1 where a check failed or a target (full size, quiet machine) was missed."""
    size = QUICK if args.quick else None

    def runner(case: Callable[[Size | None, int | None], Outcome]) -> Callable[[Journal], bool]:
        return lambda journal: case(size, args.rounds or (QUICK.rounds if args.quick else None)).report(
            journal, judge=not args.quick
        )

    cases = {name: runner(case) for name, case in CASES.items()}
    return outcome.run_cases("serving-engine", (size or LARGE).backbone, cases, args)


def _save_prompts(bare: torch.nn.Module, folder: Path, count: int) -> list[str]:
    model = fp.PromptedModel(twin(bare))  # type: ignore[arg-type]
    names = [f"prompt-{i}" for i in range(count)]
    for i, name in enumerate(names):
        model.add_prompt(name, fp.PrefixTuning(num_virtual_tokens=_VIRTUAL, init_std=INIT_STD), seed=i)
        model.save_prompt(name, folder / name)
    return names


def _link(source: Path, target: Path) -> None:
    """Another name for a prompt, whose files take no space of their own."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


def _answers(engine: Engine, text: dict[str, torch.Tensor], rows: list[str | None], new: int) -> torch.Tensor:
    """New tokens `[rows, new]` of all rows, from one run of the engine without anything known from before."""
    engine.pool.forget()
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    requests = [
        Generation(ids, prompt, params, str(i))
        for i, (ids, prompt) in enumerate(zip(text["input_ids"].tolist(), rows, strict=True))
    ]
    for request in requests:
        engine.add(request)
    answers: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        for event in engine.step():
            answers[int(event.request_id)] += event.tokens
    return torch.tensor(answers)
