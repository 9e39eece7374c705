"""Builds wheel and sdist as a user would, and tries them in fresh environments, with and without a compiler.

The fresh environments see torch and the other dependencies of the one that runs this, and nothing of the source tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USE = Path(__file__).with_name("use.py")
NATIVE = (".cpp", ".h", ".cu", ".cuh")
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def run(*command: str | Path, fails: bool = False, **env: str) -> str:
    """Output of a command that must succeed, or must fail, away from the source tree."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTPROMPT_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=tempfile.gettempdir(),
        env=clean | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"{' '.join(map(str, command))} returned {done.returncode}:\n{done.stdout}")
    return done.stdout


def environment(folder: Path) -> Path:
    """The Python of a fresh environment, with our dependencies and without fastprompt."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(packages, "dependencies.pth").write_text("\n".join(ours))
    return python


def install(folder: Path, what: Path, *options: str, **env: str) -> Path:
    """A fresh environment with `what` installed."""
    python = environment(folder)
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", *options, what, **env)
    return python


def step(text: str) -> None:
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", flush=True)


def built(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel built from the sdist, both in isolation."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sum(n.startswith("fastprompt/_native.") for n in names) == 1 and "fastprompt/_cpu/__init__.py" in names
    assert {"fastprompt/costs.json", "fastprompt/_cuda/__init__.py"} <= set(names)
    assert not any(n.startswith(("csrc/", "tests/")) for n in names)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in NATIVE}
    assert sources <= held, sources - held
    return wheel, sdist


def main(folder: Path) -> None:
    wheel, sdist = built(folder)
    step(f"built {wheel.name} and {sdist.name}")
    step(f"wheel: {run(install(folder / 'wheel', wheel), USE, 'cpu').strip()}")
    python = install(folder / "sdist", sdist, FASTPROMPT_BUILD="cpu")
    step(f"sdist: {run(python, USE, 'cpu').strip()}")

    source = folder / "source"
    shutil.unpack_archive(sdist, source)
    (source,) = source.iterdir()
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "pure", source]
    said = run(*build, "-v", **NO_COMPILER)
    assert "installing without C++ kernels: no C++ compiler (/nonexistent/c++: No such file" in said, said
    (pure,) = (folder / "pure").glob("*.whl")
    assert pure.name.endswith("-py3-none-any.whl"), pure
    step(f"no compiler: {run(install(folder / 'none', pure), USE, 'reference').strip()}")
    for env, text in (
        (NO_COMPILER | {"FASTPROMPT_BUILD": "cpu"}, "FASTPROMPT_BUILD=cpu, but the C++ kernels cannot be built"),
        ({"FASTPROMPT_BUILD": "cuda", "CUDA_HOME": "/nonexistent"}, "there is no CUDA compiler (/nonexistent/bin/nvcc"),
        ({"FASTPROMPT_BUILD": "fast"}, "expected one of none, cpu, cuda"),
    ):
        said = run(*build, fails=True, **env)
        assert text in said, said
    step("FASTPROMPT_BUILD fails where it must")


if __name__ == "__main__":
    BEGIN = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
