"""Builds the native extension with ninja; everything else about the package stands in pyproject.toml.

FASTPROMPT_BUILD unset  with the C++ kernels where a C++17 compiler works, else pure Python, saying what is missing
FASTPROMPT_BUILD=none   pure Python
FASTPROMPT_BUILD=cpu    with the C++ kernels; an error where they cannot be built
FASTPROMPT_BUILD=cuda   with the C++ and CUDA kernels; an error, as there is no CUDA source yet
FASTPROMPT_BUILD_DEBUG  1: address and undefined-behaviour sanitizers, assertions, warnings are errors

CXX, CXXFLAGS and LDFLAGS have their usual meaning. Files of csrc/cpu are compiled once for each instruction set.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("none", "cpu", "cuda")
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}  # commands that compile
DEBUG = os.environ.get("FASTPROMPT_BUILD_DEBUG", "") not in ("", "0")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread"]
NUMBERS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own intrinsics
CHECKED = ["-O1", "-g", "-fno-omit-frame-pointer", *WARNINGS, *SANITIZE]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86 = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
ISAS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}

PROBE = """
#include <Python.h>
#include <optional>
#ifdef __x86_64__
#include <immintrin.h>
#endif
extern "C" PyObject* PyInit_probe() { return std::optional<PyObject*>().value_or(nullptr); }
"""


def compiler() -> list[str]:
    """The C++ compiler as the start of a command line: CXX, or else the first usual name that is on the path."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def includes() -> list[str]:
    """Where Python's headers are."""
    return [f"-I{path}" for path in dict.fromkeys(sysconfig.get_path(n) for n in ("include", "platinclude"))]


def what_is_missing() -> str | None:
    """Why native code cannot be built here, found out by building some; None where it can."""
    for package in ("ninja", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package} is not installed, which pip brings unless build isolation is off"
    command = compiler()
    name = " ".join(command)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        flags = [*COMMON, *list(ISAS.values())[-1], *includes(), "-shared", "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run([*command, *flags, str(source)], capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler ({name}: {error.strerror}); install g++ 10 or newer, or set CXX"
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "it failed without a message")
        return f"{name} cannot build a C++17 extension: {first.strip()}"
    return None


def extensions() -> list[Extension]:
    """What FASTPROMPT_BUILD asks for; never less than that."""
    choice = os.environ.get("FASTPROMPT_BUILD") or None
    if choice not in (None, *CHOICES):
        raise SystemExit(f"FASTPROMPT_BUILD is {choice!r}, expected one of {', '.join(CHOICES)}, or unset")
    if choice == "none":
        return []
    if choice == "cuda":
        raise SystemExit("FASTPROMPT_BUILD=cuda asks for CUDA kernels, but this version has no CUDA source; use cpu")
    if BUILDING & set(sys.argv):
        reason = what_is_missing()
        if reason and choice == "cpu":
            raise SystemExit(f"FASTPROMPT_BUILD=cpu, but the C++ kernels cannot be built: {reason}")
        if reason:
            print(f"fastprompt: installing without C++ kernels: {reason}", file=sys.stderr)
            return []
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    return [Extension("fastprompt._native", sources, language="c++")]


class NinjaBuild(build_ext):
    """Compiles and links with ninja, in a folder that stays, so that only what changed is built again."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        kind = "debug" if DEBUG else "native"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file([Path(source) for source in ext.sources]))
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        done = subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs])
        if done.returncode:
            raise SystemExit("fastprompt: the C++ kernels did not build; FASTPROMPT_BUILD=none installs without them")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old one loaded keeps it
        shutil.copyfile(folder / "_native.so", target)


def build_file(sources: list[Path]) -> str:
    """The text of build.ninja."""
    import pybind11

    flags = [*COMMON, *NUMBERS, *(CHECKED if DEBUG else ["-O3"]), "-I", str(ROOT / "csrc")]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    python = [*includes(), "-isystem", pybind11.get_include()]  # elsewhere in every isolated build: for one file only
    link = [*(SANITIZE if DEBUG else []), "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
    command = escaped(shlex.join(compiler()))
    lines = [
        f"rule compile\n  command = {command} {escaped(shlex.join(flags))} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $out",
        f"rule link\n  command = {command} -shared $in {escaped(shlex.join(link))} -o $out\n  description = $out",
    ]
    objects = []
    for source in sorted(sources, key=lambda path: -(ROOT / path).stat().st_size):  # what takes longest starts first
        variants = {"common": python if source.stem == "bindings" else []}
        if source.parent.name == "cpu":
            variants = {isa: [*more, f"-DFASTPROMPT_ISA={isa}"] for isa, more in ISAS.items()}
        for name, more in variants.items():
            objects.append(f"{name}/{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {escaped(str(ROOT / source), path=True)}")
            lines.append(f"  more = {escaped(shlex.join(more))}")
    return "\n".join([*lines, f"build _native.so: link {' '.join(objects)}", ""])


def escaped(text: str, path: bool = False) -> str:
    """Text as ninja reads it; in a path blanks and colons mean something too."""
    text = text.replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if path else text


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
