"""What the pages say about compiled GPU kernels: what they take and ask for, and the errors of their PTX."""

from __future__ import annotations

import csv
from functools import cache

from bench.pages.results import Table, Tables
from bench.runs import RESULTS


@cache
def rows(file: str) -> list[dict[str, str]]:
    """The lines of a CSV file of bench/results."""
    with (RESULTS / file).open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def registers() -> Table:
    """Of the CUDA decode kernel in bfloat16, by head size and target."""
    taken = {
        (r["head_dim"], r["target"]): r["registers"]
        for r in rows("cuda_aot.csv")
        if (r["kernel"], r["dtype"]) == ("decode", "bf16")
    }
    targets = list(dict.fromkeys(target for _, target in taken))
    dims = dict.fromkeys(dim for dim, _ in taken)
    return [["D", *targets], *([dim, *(taken[dim, target] for target in targets)] for dim in dims)]


def counts() -> Table:
    """What the CUDA decode kernels' PTX asks of memory and of schedulers."""
    found = [
        [r["case"], r["head_dim"], r["loads"].lower(), r["moved"], r["rounds"], f"{int(r['instructions']):,}"]
        for r in rows("cuda_counts.csv")
    ]
    header = ["case", "D", "loads", "bytes moved", "rounds of banks", "instructions of warps for 16 keys"]
    return [header, *found]


def errors() -> Table:
    """The worst of gpu-check's calls on the Triton kernels' PTX, by target and dtype."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for r in rows("ptx.csv"):
        found.setdefault((r["target"], r["dtype"]), []).append((float(r["share"]), f"{r['call']}: {r['worst']}"))
    return [
        ["target", "dtype", "calls", "largest error", "of"],
        *([*key, str(len(all_)), f"{max(all_)[0]:.2f}", max(all_)[1]] for key, all_ in found.items()),
    ]


TABLES: Tables = {"cuda-registers": registers, "cuda-counts": counts, "ptx-errors": errors}
