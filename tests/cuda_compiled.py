"""The CUDA decode kernels compiled by nvcc for GPUs that are not here, and what ptxas and the listing say of them.

`python tests/cuda_compiled.py record` writes bench/results/cuda_aot.csv.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "cuda_aot.csv"
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100")
DTYPES = ("bf16", "fp16")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?\n"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of its chip: registers a thread, bytes of stack and of spills."""

    target: str
    kernel: str
    dtype: str
    head_dim: int
    registers: int
    stack: int
    spilled: int


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, of the path, or of the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [str(Path(home, "bin"))] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def cuobjdump() -> str | None:
    """The disassembler: beside nvcc, on the path, or in the package triton, here or in .venv-triton."""
    beside = [str(Path(compiler).parent / "cuobjdump")] if (compiler := nvcc()) else []
    tool = "triton/backends/nvidia/bin/cuobjdump"
    spec = importlib.util.find_spec("triton")
    installed = [str(Path(place).parent / tool) for place in (spec.submodule_search_locations or [])] if spec else []
    other = [str(path) for path in ROOT.glob(f".venv-triton/lib/python3*/site-packages/{tool}")]
    return next(filter(None, map(shutil.which, [*beside, "cuobjdump", *installed, *other])), None)


@cache
def known_targets() -> list[str]:
    """Those of TARGETS that this nvcc has."""
    compiler = nvcc()
    assert compiler is not None
    listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [target for target in TARGETS if target.rstrip("a") in listed.split()]


def compile_for(target: str, dtype: str, folder: Path) -> tuple[list[Compiled], Path]:
    """The kernels of a dtype, and their machine code."""
    compiler, code = nvcc(), folder / f"decode_{dtype}.{target}.cubin"
    assert compiler is not None
    source = ROOT / "csrc" / "cuda" / f"decode_{dtype}.cu"
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch={target}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [_read(found, target, dtype) for found in _ENTRY.finditer(done.stderr)], code


def _read(found: re.Match[str], target: str, dtype: str) -> Compiled:
    head_dim = re.search(r"Li(\d+)E", found["name"])
    assert head_dim is not None
    spilled = int(found["stores"]) + int(found["loads"])
    kernel = "merge" if "merge" in found["name"] else "decode"
    return Compiled(target, kernel, dtype, int(head_dim[1]), int(found["registers"]), int(found["stack"]), spilled)


def listings(code: Path) -> dict[str, list[str]]:
    """Instructions of each kernel, without operands, by the kernel's name in the object."""
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run([tool, "-sass", str(code)], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)", text)
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return dict(zip(functions[1::2], map(instruction.findall, functions[2::2]), strict=True))


def record() -> None:
    """Writes what every kernel takes on every target."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for t in known_targets() for d in DTYPES for row in compile_for(t, d, Path(folder))[0]]
    rows.sort(key=lambda row: (TARGETS.index(row.target), row.kernel, row.dtype, row.head_dim))
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    assert sys.argv[1:] == ["record"], __doc__
    record()
