"""`python -m bench COMMAND`: the benchmarks by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import compare, runs

COMMANDS = {  # name -> (module with `add_arguments(parser)` and `run(args) -> exit status`, one line of help)
    "micro": ("bench.micro", "every op against its peers, shape by shape, on the CPU"),
    "e2e": ("bench.e2e", "the whole model in two minutes: forward, generation, training; bare, PEFT, fastprompt"),
    "sweep": ("bench.sweep", "how cost grows with lengths, prompts, rows and context, on the CPU"),
    "serve": ("bench.serving_load", "the server under load: a thousand tenants through HTTP, against PEFT"),
    "compare": ("bench.compare", "two files of results as ratios; what became slower is flagged"),
    "plot": ("bench.plot", "the pictures in docs/pictures, from the last results"),
    "main-job": ("bench.main_job", "mixed prompts over one backbone against PEFT and the bare backbone, on the CPU"),
    "chosen-layers": ("bench.chosen_layers", "backward of P-Tuning v2 on the top quarter of the layers, on the CPU"),
    "train-cost": ("bench.train_cost", "a training step against PEFT and the bare backbone, on the CPU"),
    "prefix-attention": ("bench.prefix_attention", "attention to prefixes read in place against torch's, on the CPU"),
    "prefix-attention-memory": ("bench.prefix_attention_memory", "what prefix attention allocates and keeps"),
    "gpu-check": ("bench.gpu_check.command", "the kernels on this machine's NVIDIA GPU: right or not, and how fast"),
    "launch-cost": (
        "bench.launch_cost",
        "what launching a Triton kernel costs the host, with a driver that does nothing",
    ),
    "serving-engine": ("bench.serving_engine", "the serving engine against generate, without HTTP, on the CPU"),
    "registered-prompts": ("bench.registered_prompts", "a registry of 100,000 prompts against one of 10"),
    "bank-storage": ("bench.bank_storage", "what prompts kept in 8 bits do to the logits"),
    "serving-load": ("bench.serving_load", "the former name of serve"),
    "ray-replicas": ("bench.ray_replicas", "Ray Serve: tenants' replicas, and one of them killed under load"),
    "vllm-serving": ("bench.vllm_serving", "prompts inside vLLM against vLLM without, and 2,000 of them, on the CPU"),
    "quality-search": ("bench.quality.search", "how the settings for SNIPS were looked for, on validation"),
    "pages": (
        "bench.pages.command",
        "tables and numbers in README and docs/: checked against bench/results, or written",
    ),
    "quality": ("bench.quality.command", "trained prompts on real data and weights against other ways to learn"),
}


COMPARED = ("micro", "e2e", "sweep", "serve", "serving-load", "main-job", "chosen-layers", "train-cost",
            "prefix-attention", "serving-engine", "registered-prompts")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; its exit status is 1 where a numeric check failed or a target was missed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if name in given:  # only the benchmark that runs is imported
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(given)
    run = importlib.import_module(COMMANDS[args.command][0]).run
    status: int = _compared(run, args) if args.command in COMPARED else run(args)
    return status


def _compared(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a benchmark, and says what moved since its last committed run on a machine of this kind."""
    with TemporaryDirectory() as folder:
        args.out = args.out or Path(folder) / "run.jsonl"
        status = run(args)
        new = runs.read(args.out)[-1:] if args.out.exists() else []
        for line in compare.since_last(new[0]) if new else ():
            print(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
