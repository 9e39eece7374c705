"""What P-Tuning v2 on chosen layers saves: backward of the top quarter of the layers against all of them.

Both prompts train over one frozen Llama-like decoder. The forward is done once; the backward to the prompt is timed on
its graph, interleaved. Memory is by how much the process grows in one forward and backward.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import torch

import fastprompt as fp
from bench import measure, options, outcome
from bench.backbones import INIT_STD, LlamaSize, llama, random_text
from bench.measure import Agreement, Contestant, Journal
from bench.memory import peak_growth
from bench.outcome import Outcome, Target

TARGET = Target(at_most=0.45)  # of the time that the backward over all layers takes
_CASE = "backward"
_TOLERANCE = 1e-5  # of gradients, relative to their scale


@dataclass(frozen=True)
class Size:
    """How large the case is, and how often it runs."""

    backbone: LlamaSize
    rows: int
    tokens: int
    virtual: int
    rounds: int = 7


FULL = Size(LlamaSize(12, 512, 8, 2, 1408), 32, 128, 64)
QUICK = Size(LlamaSize(4, 64, 4, 2, 128, 100), 2, 9, 4, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench chosen-layers`."""
    options.add(parser, "quick", "rounds", "threads", "wait", "out")
    parser.set_defaults(case=[_CASE])


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 where the check failed, or the target on a quiet machine at full size."""
    size = QUICK if args.quick else FULL
    case = partial(backward_case, size, args.rounds or size.rounds, not args.quick)
    return outcome.run_cases("chosen-layers", size.backbone, {_CASE: case}, args)


def backward_case(size: Size, rounds: int, judge: bool, journal: Journal) -> bool:
    """The backward to a prompt of all layers, and to one of the top quarter; what both make the process grow by."""
    print(f"  {size.rows} rows of {size.tokens} tokens, {size.virtual} virtual tokens")
    model = fp.PromptedModel(llama(size.backbone))
    top = tuple(range(-max(1, size.backbone.layers // 4), 0))
    for name, layers in (("all layers", None), ("top quarter", top)):
        config = fp.PTuningV2(num_virtual_tokens=size.virtual, layers=layers, init_std=INIT_STD)
        model.add_prompt(name, config, seed=0)
    text = random_text(size.backbone, size.rows, size.tokens)
    checks = [_gradients_through_all_layers(model, text)]
    for name in model.prompt_names:
        growth = peak_growth(partial(_gradient, model, text, name))
        journal.write("memory", name=name, bytes=growth)
        print(f"  {name}: forward and backward grow the process by {growth / 2**20:.0f} MiB")
    contestants = {name: _backward(model, text, name, checks) for name in model.prompt_names}
    samples = measure.interleave(contestants, rounds)
    ratio = measure.ratio(samples, "top quarter", "all layers")
    return Outcome(_CASE, samples, checks, [(ratio, TARGET)]).report(journal, judge)


def _loss(model: fp.PromptedModel, text: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    loss: torch.Tensor = model(**text, labels=text["input_ids"], prompts=name).loss
    return loss


def _weight(model: fp.PromptedModel, name: str) -> torch.Tensor:
    return next(model.library[name].encoder.parameters())


def _gradient(model: fp.PromptedModel, text: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.autograd.grad(_loss(model, text, name), _weight(model, name))[0]


def _gradients_through_all_layers(model: fp.PromptedModel, text: dict[str, torch.Tensor]) -> Agreement:
    """The top quarter's gradient, where the backward goes down to the embeddings too, and where it stops."""
    agreement = Agreement("gradient of the top quarter, with the whole backbone in the graph and without", _TOLERANCE)
    embeds = model.backbone.get_input_embeddings()(text["input_ids"]).requires_grad_()
    whole = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
    loss = model(**whole, labels=text["input_ids"], prompts="top quarter").loss
    agreement.check(torch.autograd.grad(loss, [_weight(model, "top quarter"), embeds])[0])
    agreement.check(_gradient(model, text, "top quarter"))
    return agreement


def _backward(model: fp.PromptedModel, text: dict[str, torch.Tensor], name: str, checks: list[Agreement]) -> Contestant:
    """The backward from one loss to one prompt, again and again."""
    loss, weight = _loss(model, text, name), _weight(model, name)
    agreement = Agreement(f"gradient of {name}")
    checks.append(agreement)

    def run() -> torch.Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0]

    agreement.check(run())
    return Contestant(run, agreement.check)
