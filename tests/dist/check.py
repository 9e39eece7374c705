"""Tries the sdist and the wheels of `make wheels` as users would: what pip picks, what runs, what builds from source.

The fresh environments see torch and the other dependencies of the one that runs this, and nothing of the source tree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import contents

HERE = Path(__file__).parent
NOTHING: Mapping[str, str] = {}
NO_COMPILER = {"CXX": "/nonexistent/c++"}
ALL_TAKEN = """#!/bin/sh
for last; do :; done # what a compiler is told to make stands last
: >"$last"
"""


def ran(
    *command: str | Path, fails: bool = False, env: Mapping[str, str] = NOTHING
) -> subprocess.CompletedProcess[str]:
    """A command that must succeed, or must fail, away from the source tree."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTPROMPT_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=tempfile.gettempdir(), env={**clean, **env}, text=True, capture_output=True
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"{' '.join(map(str, command))} returned {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def run(*command: str | Path, fails: bool = False) -> str:
    """What a command prints; not what it warns of."""
    return ran(*command, fails=fails).stdout


def pip(*arguments: str | Path, fails: bool = False, env: Mapping[str, str] = NOTHING) -> str:
    """All that pip and what it builds say."""
    done = ran(sys.executable, "-m", "pip", *arguments, fails=fails, env=env)
    return done.stdout + done.stderr


def step(text: str) -> None:
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", flush=True)


def check_choice(wheels: contents.Wheels, scratch: Path) -> None:
    """pip takes the native wheel where its Python and its platform are, and the pure one everywhere else."""
    mine, other = ("3.10", "3.11") if sys.version_info[:2] == (3, 10) else ("{}.{}".format(*sys.version_info), "3.10")
    native = ("--platform", wheels.platform)
    for at, (target, expected) in enumerate(
        (
            ((), wheels.native),
            ((*native, "--python-version", mine), wheels.native),
            ((*native, "--python-version", other), wheels.pure),
            (("--platform", "manylinux_2_17_x86_64", "--python-version", mine), wheels.pure),
            (("--platform", "macosx_14_0_arm64", "--python-version", mine), wheels.pure),
        )
    ):
        into = scratch / f"choice{at}"
        only = ("--no-index", "--no-deps", "--only-binary", ":all:", "--find-links", wheels.folder)
        pip("download", *only, *target, "--dest", into, "fastprompt")
        taken = [path.name for path in into.iterdir()]
        assert taken == [expected.name], (target, taken)
    step(f"pip takes {wheels.platform} for Python {mine}, py3-none-any elsewhere")


def install(folder: Path, what: Path) -> Path:
    """The Python of a fresh environment with a wheel, and types that its users see; then with our dependencies."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-index", "--no-deps", what)
    check_types(python, folder)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(packages, "dependencies.pth").write_text("\n".join(ours))
    return python


def check_types(python: Path, folder: Path) -> None:
    """mypy knows what a user's program gets from the installed package, and finds its mistake."""
    options = ("--strict", "--no-error-summary", "--cache-dir", folder / "mypy", "--python-executable", python)
    said = run(sys.executable, "-m", "mypy", *options, HERE / "typed.py", fails=True).splitlines()
    assert len(said) == 2 and said[0].endswith('note: Revealed type is "int"'), said
    assert 'expected "int"  [arg-type]' in said[1], said


def check_use(python: Path, impl: str) -> str:
    """Ops, `fastprompt info` and `fastprompt generate` in an environment, by the implementation that must run there."""
    said = run(python, HERE / "use.py", impl).strip()
    command = python.with_name("fastprompt")
    info = json.loads(run(command, "info", "--json"))
    assert (
        set(info["chosen"]["cpu"].values()) <= {impl, "reference"} and info["chosen"]["cpu"]["prefix_attention"] == impl
    )
    assert info["problem"] is None, info
    text = ("--backbone", "embedded", "--text", "fistan =", "--max-new-tokens", "3", "--json")
    (row,) = json.loads(run(command, "generate", *text))["rows"]
    assert row["text"] == "fistan =" and row["output"], row
    return said


def check_wheel(wheel: Path, scratch: Path, impl: str) -> None:
    """Installed in an environment of its own, a wheel runs by the implementation that it must."""
    step(f"{wheel.name}: {check_use(install(scratch, wheel), impl)}")


def check_sources(wheels: contents.Wheels, scratch: Path) -> None:
    """Building the sdist without a compiler, with one, and where FASTPROMPT_BUILD asks for what cannot be."""
    shutil.unpack_archive(wheels.sdist, scratch)
    source = scratch / wheels.sdist.name.removesuffix(".tar.gz")
    build = ("wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch / "wheels", source)

    said = pip(*build, "-v", env=NO_COMPILER)
    assert "installing without C++ kernels: no C++ compiler (/nonexistent/c++: No such file" in said, said
    assert contents.names(scratch / "wheels" / wheels.pure.name) == contents.names(wheels.pure)
    step("no compiler: pure Python, saying so")

    compiler = scratch / "c++"
    compiler.write_text(ALL_TAKEN)
    compiler.chmod(0o755)
    pip(*build, env={"CXX": str(compiler)})
    (made,) = (scratch / "wheels").glob("*-linux_*.whl")
    assert contents.names(made) == contents.names(wheels.native)
    step("a compiler and FASTPROMPT_BUILD unset: native")

    for env, text in (
        (NO_COMPILER | {"FASTPROMPT_BUILD": "cpu"}, "FASTPROMPT_BUILD=cpu, but the C++ kernels cannot be built"),
        ({"FASTPROMPT_BUILD": "cuda", "CUDA_HOME": "/nonexistent"}, "there is no CUDA compiler (/nonexistent/bin/nvcc"),
        ({"FASTPROMPT_BUILD": "fast"}, "expected one of none, cpu, cuda"),
    ):
        said = pip(*build, fails=True, env=env)
        assert text in said, said
    step("FASTPROMPT_BUILD fails where it must")


def main(dist: Path, scratch: Path) -> None:
    wheels = contents.check(dist)
    step(f"{wheels.sdist.name}, {wheels.pure.name}, {wheels.native.name} hold what they must")
    check_choice(wheels, scratch)
    with ThreadPoolExecutor(2) as pool:
        native = pool.submit(check_wheel, wheels.native, scratch / "cpu", "cpu")
        pure = pool.submit(check_wheel, wheels.pure, scratch / "reference", "reference")
        for each in (native, pure, pool.submit(check_sources, wheels, scratch / "source")):
            each.result()


if __name__ == "__main__":
    BEGIN = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]).resolve(), Path(temporary))
