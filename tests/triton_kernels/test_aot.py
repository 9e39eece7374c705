"""Every kernel in every configuration, compiled for GPUs that are not here: no spills and no stack."""

import csv
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "bench" / "results" / "aot.csv"
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program
# sm_80 stands for all chips that share 99 KiB or more: its own limit is 163 KiB.
WITHOUT_PRODUCTS = ("delta", "merge", "embed_prompts")
WIDE = {  # cases and kernels whose tiles have the 64 rows that these take:
    "bf16 D64": "prefix",
    "bf16 D128": "prefix",
    "bf16 D64 prefixes read together": "paged",
    "bf16 D128 prefixes read together": "paged",
}
NAMES = ("target", "kernel", "case", "warps", "stages")
LONG = pytest.mark.long
BEST = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def compiled(target: str) -> list[dict[str, str]]:
    """The lines of the record, for one target."""
    return list(csv.DictReader(StringIO(run("compile_all.py", target))))


def run(script: str, *args: str) -> str:
    """Output of a script in a process of its own, where kernels are not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, HERE / script, *args], env={**env, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("target", [pytest.param(t, marks=() if t == "sm_90" else LONG) for t in SHARED_LIMIT])
def test_aot(target):
    lines = compiled(target)
    assert lines
    for line in lines:
        assert int(line["spilled"]) == 0 and int(line["stack"]) == 0, line
        assert int(line["shared"]) <= SHARED_LIMIT[target], line
        product = not any(word in line["kernel"] for word in WITHOUT_PRODUCTS)
        if product and ("fp32" not in line["case"] or target == "gfx942"):
            assert line["tensor_core"], line
            if target in BEST and line["case"] in WIDE and line["kernel"].startswith(WIDE[line["case"]]):
                assert line["tensor_core"] == BEST[target], line
    # registers are another compiler's business; what is recorded must be what there is
    with RECORD.open() as file:
        recorded = [tuple(line[n] for n in NAMES) for line in csv.DictReader(file) if line["target"] == target]
    assert recorded == [tuple(line[n] for n in NAMES) for line in lines]


def test_remembered_launches_are_those_of_triton():
    assert int(run("launches.py")) == 160
