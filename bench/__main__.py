"""`python -m bench COMMAND`: the benchmarks by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import compare, runs


@dataclass(frozen=True)
class Command:
    """A module of bench with `add_arguments(parser)` and `run(args) -> exit status`, and one line of help.

    What is `compared` says at its end what moved since its last committed run on a machine of this kind.
    """

    module: str
    about: str
    compared: bool = False

    def load(self) -> Any:
        """The module, which is imported only when it is needed."""
        return importlib.import_module(f"bench.{self.module}")


COMMANDS = {
    "micro": Command("micro", "every op against its peers, shape by shape, on the CPU", True),
    "e2e": Command("e2e", "the whole model in two minutes: forward, generating, training", True),
    "serve": Command("serving_load", "the server under load: a thousand tenants through HTTP, against PEFT", True),
    "fairness": Command("serving_fairness", "first tokens of a quiet tenant beside one that floods the server", True),
    "sweep": Command("sweep", "how cost grows with lengths, prompts, rows and context, on the CPU", True),
    "gpu-check": Command("gpu_check.command", "the kernels on this machine's NVIDIA GPU: right or not, and how fast"),
    "compare": Command("compare", "two files of results as ratios; what became slower is flagged"),
    "plot": Command("plot", "the pictures in docs/pictures, from the last results"),
    "pages": Command("pages.command", "measured numbers in README and docs/, checked against bench/results or written"),
    "main-job": Command("main_job", "mixed prompts over one backbone, against PEFT and the bare backbone", True),
    "train-cost": Command("train_cost", "a training step, against PEFT and the bare backbone", True),
    "chosen-layers": Command("chosen_layers", "backward of P-Tuning v2 on the top quarter of the layers", True),
    "prefix-attention": Command("prefix_attention", "micro of attention alone, with targets and more shapes", True),
    "prefix-attention-memory": Command("prefix_attention_memory", "what prefix attention allocates and keeps"),
    "quickstart": Command("quickstart", "from a fresh clone to the demo's first mixed batch, downloads included"),
    "launch-cost": Command("launch_cost", "what launching a Triton kernel costs the host"),
    "serving-engine": Command("serving_engine", "the serving engine against generate, without HTTP", True),
    "registered-prompts": Command("registered_prompts", "a registry of 100,000 prompts against one of 10", True),
    "bank-storage": Command("bank_storage", "what prompts kept in 8 bits do to the logits"),
    "ray-replicas": Command("ray_replicas", "Ray Serve: tenants' replicas, and one of them killed under load"),
    "vllm-serving": Command("vllm_serving", "prompts inside vLLM against vLLM without, and 2,000 of them"),
    "quality": Command("quality.command", "trained prompts on real data and weights against other ways to learn"),
    "quality-search": Command("quality.search", "how the settings for SNIPS were looked for, on validation"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; its exit status is 1 where a numeric check failed or a target was missed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in given:  # only the benchmark that runs is imported
            added.description = command.load().__doc__
            command.load().add_arguments(added)
    args = parser.parse_args(given)
    command = COMMANDS[args.command]
    run = command.load().run
    status: int = _compared(run, args) if command.compared else run(args)
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
