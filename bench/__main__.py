"""`python -m bench COMMAND`: the benchmarks by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # name -> (module with `add_arguments(parser)` and `run(args) -> exit status`, one line of help)
    "main-job": ("bench.main_job", "mixed prompts over one backbone against PEFT and the bare backbone, on the CPU"),
    "chosen-layers": ("bench.chosen_layers", "backward of P-Tuning v2 on the top quarter of the layers, on the CPU"),
    "train-cost": ("bench.train_cost", "a training step against PEFT and the bare backbone, on the CPU"),
    "prefix-attention": ("bench.prefix_attention", "attention to prefixes read in place against torch's, on the CPU"),
    "prefix-attention-memory": ("bench.prefix_attention_memory", "what prefix attention allocates and keeps"),
    "gpu-check": ("bench.gpu_check.command", "the kernels on this machine's NVIDIA GPU: right or not, and how fast"),
    "serving-engine": ("bench.serving_engine", "the serving engine against generate, without HTTP, on the CPU"),
    "registered-prompts": ("bench.registered_prompts", "a registry of 100,000 prompts against one of 10"),
    "serving-load": ("bench.serving_load", "the server under load: a thousand tenants through HTTP, against PEFT"),
    "quality-search": ("bench.quality.search", "how the settings for SNIPS were looked for, on validation"),
    "quality": ("bench.quality.command", "trained prompts on real data and weights against other ways to learn"),
}


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
    status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
