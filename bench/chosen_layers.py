"""What P-Tuning v2 on chosen layers saves: backward of the top quarter of the layers against all of them.

Both prompts train over one frozen Llama-like decoder. The forward is done once; the backward to the prompt is timed on
its graph, interleaved. Memory is by how much the process grows in one forward and backward.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict

import torch

import fastprompt as fp
from bench import machine, measure, options
from bench.backbones import LlamaSize, facts, llama, random_text
from bench.measure import Agreement, CheckFailed, Contestant, Journal
from bench.prefix_attention_memory import peak_growth

TARGET = 0.45  # of the time that the backward over all layers takes
FULL = (LlamaSize(12, 512, 8, 2, 1408), 32, 128, 64)  # backbone, rows, text tokens, virtual tokens
QUICK = (LlamaSize(4, 64, 4, 2, 128, 100), 2, 9, 4)
_TOLERANCE = 1e-5  # of gradients, relative to their scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench chosen-layers`."""
    options.add(parser, "quick", "threads", "wait", "out", rounds=7)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 where the check failed, or the target on a quiet machine at full size."""
    torch.set_num_threads(args.threads)
    size, rows, tokens, length = QUICK if args.quick else FULL
    model = fp.PromptedModel(llama(size))
    top = tuple(range(-max(1, size.layers // 4), 0))
    for name, layers in (("all layers", None), ("top quarter", top)):
        model.add_prompt(name, fp.PTuningV2(num_virtual_tokens=length, layers=layers, init_std=0.5), seed=0)
    text = random_text(size, rows, tokens)
    with args.out.open("a") if args.out else nullcontext() as out:
        journal = Journal(out)
        journal.write("machine", benchmark="chosen-layers", quick=args.quick, backbone=facts(size), **machine.facts())
        print(f"{size.describe()}; {rows} rows of {tokens} tokens, {length} virtual tokens")
        if args.wait and not measure.wait_until_quiet(args.wait):
            print("  other processes keep the machine busy: times will be noisy")
        try:
            checks = [_gradients_through_all_layers(model, text)]
            for name in model.prompt_names:
                growth = peak_growth(lambda name=name: _gradient(model, text, name))
                journal.write("memory", name=name, bytes=growth)
                print(f"  {name}: forward and backward grow the process by {growth / 2**20:.0f} MiB")
            contestants = {name: _backward(model, text, name, checks) for name in model.prompt_names}
            samples = measure.interleave(contestants, args.rounds)
            for check in checks:
                check.finish()
        except CheckFailed as error:
            journal.write("check", green=False, error=str(error))
            print(f"CHECK FAILED, no ratios: {error}")
            return 1
        ratio = measure.ratio(samples, "top quarter", "all layers")
        journal.samples("backward", samples)
        judged = ratio.quiet and not args.quick
        met = ratio.wall.median <= TARGET if judged else None
        journal.write("ratio", case="backward", target=f"<= {TARGET:g}x", met=met, **asdict(ratio))
    for name, runs in samples.items():
        wall, cpu = (measure.Spread.of([getattr(s, clock) for s in runs]).median for clock in ("wall", "cpu"))
        print(f"  backward of {name}: wall {wall:.3f} s, cpu {cpu:.3f} s")
    print(f"  top quarter / all layers: wall {ratio.wall.median:.3f}x, cpu {ratio.cpu.median:.3f}x, target {TARGET:g}x")
    if not judged:
        print("  a busy machine, or tiny sizes: no proof")
    return int(met is False)


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
