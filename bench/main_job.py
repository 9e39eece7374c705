"""The main job on the CPU: mixed prompts over one frozen backbone, against PEFT and against the bare backbone.

Four cases, each one interleaved run in float32, with every timed result checked before a ratio is shown:

    generate   every row its own prefix prompt, greedy generation: one mixed batch, PEFT adapter after adapter, bare
    forward    one prompt-tuning prompt for all rows, logits of a text batch: fastprompt, PEFT, bare
    prefix     the same with a prefix prompt
    bank       the same rows and prompts with few and with many prompts resident in the bank
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import fastprompt as fp
from bench import measure, outcome
from bench.backbones import INIT_STD, LlamaSize, greedy, llama, random_text, twin, with_peft
from bench.measure import Agreement, CheckFailed, Contestant, Journal
from bench.outcome import NOISE, Outcome, Target

LOGITS = 1e-4  # largest difference to PEFT and the bare backbone allowed, relative to the logits' scale


@dataclass(frozen=True)
class Size:
    """How large the cases are; `rounds` of the interleaved run, in every `peft_every`-th of which PEFT generates."""

    backbone: LlamaSize
    rounds: int
    peft_every: int
    generate: tuple[int, int, int, int]  # rows, virtual tokens, text tokens, new tokens
    forward: tuple[int, int, int]  # rows, virtual tokens, text tokens
    bank: tuple[int, int, int, int, int, int]  # rows, virtual tokens, text tokens, new tokens, few, many prompts


FULL = Size(LlamaSize(), 7, 3, (32, 64, 16, 32), (8, 64, 128), (8, 16, 16, 16, 10, 1000))
QUICK = Size(LlamaSize(2, 64, 4, 2, 128, 100), 3, 2, (4, 8, 5, 4), (2, 8, 9), (2, 4, 5, 4, 4, 12))


def generate_case(size: Size, rounds: int) -> Outcome:
    """Rows of as many prompts, generating: one mixed batch, PEFT row by row, the bare backbone's batch."""
    rows, length, text_tokens, new = size.generate
    bare = llama(size.backbone)
    ours = fp.PromptedModel(twin(bare))
    # more prompts than rows and rows in any order: the extents a batch reads lie scattered, as in use
    names = shuffled(add_prefixes(ours, rows + rows // 2, length))[:rows]
    text = random_text(size.backbone, rows, text_tokens)
    with TemporaryDirectory() as folder:
        peft = with_peft(bare, _export(ours, names, Path(folder)))
    prompted, plain = Agreement("greedy tokens, fastprompt and PEFT"), Agreement("greedy tokens without prompts")

    def peft_row_by_row() -> torch.Tensor:
        made = []
        for row, name in enumerate(names):
            peft.set_adapter(name)
            made.append(peft.generate(**{k: v[row : row + 1] for k, v in text.items()}, **greedy(new)))
        return torch.cat(made)

    plain.check(bare.generate(**text, **greedy(new)))
    plain.check(ours.generate(**text, **greedy(new)))
    logits = Agreement("logits, fastprompt and PEFT", LOGITS)
    for row in (0, rows - 1):
        peft.set_adapter(names[row])
        one = {k: v[row : row + 1] for k, v in text.items()}
        logits.equal(ours(**text, prompts=names).logits[row : row + 1], peft(**one).logits)
    contestants = {
        "fastprompt": Contestant(lambda: ours.generate(**text, prompts=names, **greedy(new)), prompted.check),
        "bare": Contestant(lambda: bare.generate(**text, **greedy(new)), plain.check),
        "peft, row by row": Contestant(peft_row_by_row, prompted.check, size.peft_every),
    }
    samples = measure.interleave(contestants, rounds)
    ratios = [
        (measure.ratio(samples, "peft, row by row", "fastprompt"), Target(at_least=6.0)),
        (measure.ratio(samples, "fastprompt", "bare"), Target(at_most=1.15)),
    ]
    return Outcome("generate", samples, (prompted, plain, logits), ratios)


def forward_case(size: Size, rounds: int) -> Outcome:
    """One prompt-tuning prompt for all rows: logits of the text, without gradients."""
    length = size.forward[1]
    return _forward("forward", size, rounds, fp.PromptTuning(num_virtual_tokens=length, init="vocab"), length, 1.10)


def prefix_case(size: Size, rounds: int) -> Outcome:
    """One prefix prompt for all rows: logits of the text, without gradients."""
    config = fp.PrefixTuning(num_virtual_tokens=size.forward[1], init_std=INIT_STD)
    return _forward("prefix", size, rounds, config, 0, 1.02)


def _forward(case: str, size: Size, rounds: int, config: fp.PromptConfig, virtual: int, at_most: float) -> Outcome:
    """Logits of a batch that shares one prompt; PEFT answers with `virtual` more of them in front."""
    rows, _, text_tokens = size.forward
    bare = llama(size.backbone)
    ours = fp.PromptedModel(twin(bare))
    ours.add_prompt("it", config, seed=0)
    text = random_text(size.backbone, rows, text_tokens)
    with TemporaryDirectory() as folder:
        peft = with_peft(bare, _export(ours, ["it"], Path(folder)))
    prompted, plain = Agreement("logits, fastprompt and PEFT", LOGITS), Agreement("logits without prompt", LOGITS)
    plain.check(ours(**text).logits)
    contestants = {
        "fastprompt": Contestant(lambda: ours(**text, prompts="it").logits, prompted.check),
        "bare": Contestant(lambda: bare(**text).logits, plain.check),
        "peft": Contestant(lambda: peft(**text).logits[:, virtual:], prompted.check),
    }
    for contestant in contestants.values():  # the first forward writes our prompt to the bank, once for all
        contestant.check(contestant.run())
    samples = measure.interleave(contestants, rounds)
    ratios = [
        (measure.ratio(samples, "fastprompt", "bare"), Target(at_most=at_most)),
        (measure.ratio(samples, "peft", "bare"), None),
    ]
    return Outcome(case, samples, (prompted, plain), ratios)


def bank_case(size: Size, rounds: int) -> Outcome:
    """The same rows and prompts, with few and with many prompts in the bank, and with few again to see the noise."""
    rows, length, text_tokens, new, few, many = size.bank
    bare = llama(size.backbone)
    models = {count: fp.PromptedModel(twin(bare)) for count in (few, many)}
    names: dict[int, list[str]] = {}
    for count, model in models.items():
        names[count] = add_prefixes(model, count, length)
    # the same prompts in both, scattered over all of either bank
    used = {count: shuffled(names[count])[:rows] for count in (few, many)}
    for small, large in zip(used[few], used[many], strict=True):
        models[few].library[small].load_state_dict(models[many].library[large].state_dict())
    text = random_text(size.backbone, rows, text_tokens)
    tokens = Agreement("greedy tokens, few and many prompts in the bank")

    def contestant(count: int) -> Contestant:
        model = models[count]
        return Contestant(lambda: model.generate(**text, prompts=used[count], **greedy(new)), tokens.check)

    small, large = f"{few} prompts", f"{many} prompts"
    again = f"{small}, again"
    contestants = {small: contestant(few), large: contestant(many), again: contestant(few)}
    for entry in contestants.values():
        entry.check(entry.run())
    samples = measure.interleave(contestants, rounds)
    noise = measure.ratio(samples, again, small)
    target = Target(at_most=max(NOISE, noise.wall.p80))
    return Outcome("bank", samples, (tokens,), [(measure.ratio(samples, large, small), target), (noise, None)])


CASES: dict[str, Callable[[Size, int], Outcome]] = {
    "generate": generate_case,
    "forward": forward_case,
    "prefix": prefix_case,
    "bank": bank_case,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench main-job`."""
    outcome.add_arguments(parser, list(CASES))


def run(args: argparse.Namespace) -> int:
    """Runs the cases and prints a table; 1 where a check failed or a target (full size, quiet machine) was missed."""
    size = QUICK if args.quick else FULL

    def runner(case: Callable[[Size, int], Outcome]) -> Callable[[Journal], bool]:
        return lambda journal: case(size, args.rounds or size.rounds).report(journal, judge=not args.quick)

    with torch.no_grad():
        return outcome.run_cases("main-job", size.backbone, {name: runner(case) for name, case in CASES.items()}, args)


def add_prefixes(model: fp.PromptedModel, count: int, length: int) -> list[str]:
    """`count` random prefix prompts, all resident in the bank one after the other; their names."""
    config = fp.PrefixTuning(num_virtual_tokens=length, init_std=INIT_STD)
    for i in range(count):
        model.add_prompt(f"prompt-{i}", config, seed=i)
    with model.library.prefix_batch(model.prompt_names):
        pass  # writes what is not in the bank yet
    if len(model.library.bank) != count:
        raise CheckFailed(f"{len(model.library.bank)} prompts are in the bank, expected {count}")
    return model.prompt_names


def shuffled(names: Sequence[str]) -> list[str]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return [names[i] for i in order.tolist()]


def _export(model: fp.PromptedModel, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The prompts as PEFT adapter folders."""
    for name in names:
        model.save_prompt(name, folder / name, format="peft")
    return {name: folder / name for name in names}
