"""Prefix attention on the CPU: ours against every correct way to write it with torch's attention, case by case."""

from __future__ import annotations

import argparse

from bench import micro


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench prefix-attention`, which are those of `micro` without a choice of ops."""
    micro.add_choices(parser)


def run(args: argparse.Namespace) -> int:
    """`micro` of this op alone."""
    args.op = ["prefix_attention"]
    return micro.run(args, "prefix-attention")
