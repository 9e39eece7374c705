"""The calls that `python -m bench gpu-check` makes of every op, on the Triton kernels' PTX.

`PYTHONPATH=.:tests python tests/triton_ptx/grid.py record`, in .venv-triton, runs all of them and writes the largest
error of each, as a share of what is allowed, into bench/results/ptx.csv.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from ptx_machine import Copies
from triton_ptx.machine import running

from bench.gpu_check import numerics
from bench.gpu_check.grid import GRID
from bench.gpu_check.setting import Setting

RECORD = Path(__file__).parents[2] / "bench" / "results" / "ptx.csv"
COMPILED = (("sm_90", "bf16"), ("sm_90", "fp16"), ("sm_90", "fp32"), ("sm_80", "bf16"))
COLUMNS = ("target", "dtype", "call", "kernels", "worst", "share")


def check(target: str, dtype: str, call: str, when: Copies = Copies.LATE, seed: int | None = None) -> dict[str, Any]:
    """Runs a call and its gradients against float64, and twice more for the same bits; what was found."""
    found: list[dict[str, Any]] = []
    with running(target, when, seed) as ran, mock.patch.object(Setting, "repeats", 1):
        numerics.run(f"{call}, {dtype}", Setting("cpu", "triton"), lambda kind, **line: found.append(line))
    (line,) = found
    worst = max(line["errors"], key=line["errors"].get)
    names = " ".join(sorted({name.removesuffix("_kernel") for name in ran}))
    share = f"{line['errors'][worst]:.2g}"
    return dict(zip(COLUMNS, (target, dtype, call, names, worst, share), strict=True))


if __name__ == "__main__":
    assert sys.argv[1:] == ["record"], __doc__
    with RECORD.open("w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for target, dtype in COMPILED:
            for call in GRID:
                writer.writerow(check(target, dtype, call))
                file.flush()
