"""Builds the native extensions with ninja; everything else about the package stands in pyproject.toml.

FASTPROMPT_BUILD unset  with the C++ kernels where a C++17 compiler works, else pure Python, saying what is missing
FASTPROMPT_BUILD=none   pure Python
FASTPROMPT_BUILD=cpu    with the C++ kernels; an error where they cannot be built
FASTPROMPT_BUILD=cuda   with the C++ and CUDA kernels, no GPU needed; an error where they cannot be built
FASTPROMPT_BUILD_DEBUG  1: C++ kernels with address and undefined-behaviour sanitizers, warnings are errors, no AVX2
FASTPROMPT_CUDA_ARCHS   GPUs to build for; those of CUDA_ARCHS that nvcc knows if unset
CUDA_HOME               where CUDA is; nvcc of the path, or of /usr/local/cuda, if unset

CXX, CXXFLAGS and LDFLAGS have their usual meaning. Files of csrc/cpu are compiled once for each instruction set.
"""

import importlib.util
import os
import platform
import re
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
CPU, CUDA = "fastprompt._native", "fastprompt._native_cuda"

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread"]
NUMBERS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own intrinsics
CHECKED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-DFASTPROMPT_WITHOUT_AVX2", *WARNINGS, *SANITIZE]
OPTIMIZED = ["-O3", "-DNDEBUG"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86 = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
ISAS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
if DEBUG:  # its vectors of eight are the code of the portable ones of four and of AVX-512's of sixteen
    ISAS = {isa: flags for isa, flags in ISAS.items() if isa != "avx2"}
CUDA_ARCHS = ("80", "89", "90a", "100")
NVCC = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread"]

PROBE = """
#include <Python.h>
#include <optional>
#ifdef __x86_64__
#include <immintrin.h>
#endif
extern "C" PyObject* PyInit_probe() { return std::optional<PyObject*>().value_or(nullptr); }
"""
CUDA_PROBE = """
#include <cuda_runtime.h>
__global__ void kernel(int* x) { *x = 1; }
extern "C" int probe(int* x) { kernel<<<1, 1>>>(x); return cudaGetLastError(); }
"""


def compiler() -> list[str]:
    """The C++ compiler as the start of a command line: CXX, or else the first usual name that is on the path."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")]


def cuda_compiler() -> list[str]:
    """nvcc as the start of a command line, with CXX for what is not for the GPU."""
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return [found, *(["-ccbin", compiler()[0]] if os.environ.get("CXX") else [])]


def includes() -> list[str]:
    """Where Python's headers are."""
    return [f"-I{path}" for path in dict.fromkeys(sysconfig.get_path(n) for n in ("include", "platinclude"))]


def what_is_missing() -> str | None:
    """Why C++ code cannot be built here, found out by building some; None where it can."""
    for package in ("ninja", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package} is not installed, which pip brings unless build isolation is off"
    flags = [*COMMON, *list(ISAS.values())[-1], *includes()]
    return tried(compiler(), PROBE, ".cpp", flags, "C++ compiler", "install g++ 10 or newer, or set CXX")


def what_cuda_is_missing() -> str | None:
    """Why CUDA code cannot be built here, found out by building some; None where it can."""
    flags = [*NVCC, f"-arch=sm_{cuda_archs()[0]}", "--cudart", "static"]
    return tried(
        cuda_compiler(), CUDA_PROBE, ".cu", flags, "CUDA compiler", "install nvcc 12 or newer, or set CUDA_HOME"
    )


def tried(command: list[str], text: str, suffix: str, flags: list[str], kind: str, remedy: str) -> str | None:
    """Why a compiler cannot make a library of some lines; None where it can."""
    name = " ".join(command)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(text)
        try:
            more = [*flags, "-shared", "-o", f"{folder}/probe.so", str(source)]
            done = subprocess.run([*command, *more], capture_output=True, text=True)
        except OSError as error:
            return f"no {kind} ({name}: {error.strerror}); {remedy}"
    if done.returncode:
        said = (done.stderr + done.stdout).splitlines()
        first = next((line for line in said if "error" in line or "fatal" in line), "it failed without a message")
        return f"{name} cannot build a C++17 extension: {first.strip()}"
    return None


def cuda_archs() -> list[str]:
    """GPUs to build for, as nvcc calls them: what FASTPROMPT_CUDA_ARCHS names, or what nvcc knows of the usual ones."""
    try:
        listed = subprocess.run([cuda_compiler()[0], "--list-gpu-code"], capture_output=True, text=True).stdout
    except OSError as error:
        raise SystemExit(
            f"FASTPROMPT_BUILD=cuda, but there is no CUDA compiler ({cuda_compiler()[0]}: {error.strerror}); "
            "install nvcc 12 or newer, or set CUDA_HOME"
        ) from None
    known = re.findall(r"sm_(\d+)", listed)
    wanted = re.split(r"[;, ]+", os.environ.get("FASTPROMPT_CUDA_ARCHS", "").strip("; ,"))
    if wanted == [""]:
        wanted = [arch for arch in CUDA_ARCHS if arch.rstrip("af") in known]
    for arch in wanted:
        number = re.fullmatch(r"(\d+)[af]?", arch)
        if number is None or number[1] not in known or int(number[1]) < 80:
            raise SystemExit(
                f"FASTPROMPT_CUDA_ARCHS has {arch!r}, expected some of "
                f"{', '.join(n for n in known if int(n) >= 80)} (with an a behind 90 and 100 if wanted), or unset"
            )
    return wanted


def extensions() -> list[Extension]:
    """What FASTPROMPT_BUILD asks for; never less than that."""
    choice = os.environ.get("FASTPROMPT_BUILD") or None
    if choice not in (None, *CHOICES):
        raise SystemExit(f"FASTPROMPT_BUILD is {choice!r}, expected one of {', '.join(CHOICES)}, or unset")
    if choice == "none":
        return []
    if BUILDING & set(sys.argv):
        reason = what_is_missing()
        if reason and choice:
            raise SystemExit(f"FASTPROMPT_BUILD={choice}, but the C++ kernels cannot be built: {reason}")
        if reason:
            print(f"fastprompt: installing without C++ kernels: {reason}", file=sys.stderr)
            return []
        reason = what_cuda_is_missing() if choice == "cuda" else None
        if reason:
            raise SystemExit(f"FASTPROMPT_BUILD=cuda, but the CUDA kernels cannot be built: {reason}")
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu"))
    cuda = [str(path) for path in sources if "cuda" in path.parts]
    built = [Extension(CPU, [str(path) for path in sources if "cuda" not in path.parts], language="c++")]
    return [*built, Extension(CUDA, cuda, language="c++")] if choice == "cuda" else built


class NinjaBuild(build_ext):
    """Compiles and links with ninja, in a folder that stays, so that only what changed is built again."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        cuda = ext.name == CUDA
        kind = "cuda" if cuda else "debug" if DEBUG else "native"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        sources = [Path(source) for source in ext.sources]
        library = f"{ext.name.rpartition('.')[2]}.so"
        (folder / "build.ninja").write_text(cuda_build_file(sources, library) if cuda else build_file(sources, library))
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        done = subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder), *jobs])
        if done.returncode:
            kernels = "CUDA" if cuda else "C++"
            remedy = "FASTPROMPT_BUILD=cpu" if cuda else "FASTPROMPT_BUILD=none"
            raise SystemExit(f"fastprompt: the {kernels} kernels did not build; {remedy} installs without them")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old one loaded keeps it
        shutil.copyfile(folder / library, target)


def build_file(sources: list[Path], library: str) -> str:
    """The text of build.ninja for the C++ kernels."""
    flags = [*COMMON, *NUMBERS, *(CHECKED if DEBUG else OPTIMIZED), "-I", str(ROOT / "csrc")]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link = [*(SANITIZE if DEBUG else []), "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        rule("compile", [*compiler(), *flags]),
        f"rule link\n  command = {shell(compiler())} -shared $in {shell(link)} -o $out\n  description = $out",
    ]
    objects = []
    for source in longest_first(sources):
        variants = {"common": python_headers() if source.stem == "bindings" else []}
        if source.parent.name == "cpu":
            variants = {isa: [*more, f"-DFASTPROMPT_ISA={isa}"] for isa, more in ISAS.items()}
        for name, more in variants.items():
            objects.append(f"{name}/{source.stem}.o")
            lines.append(build(objects[-1], "compile", source, more))
    return "\n".join([*lines, f"build {library}: link {' '.join(objects)}", ""])


def cuda_build_file(sources: list[Path], library: str) -> str:
    """The text of build.ninja for the CUDA kernels: every .cu for all GPUs at once, CUDA's own runtime built in."""
    archs = cuda_archs()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = [arch for arch in archs if arch.isdigit()]
    if plain:  # as PTX too, which the driver compiles for GPUs that come later
        codes.append(f"-gencode=arch=compute_{plain[-1]},code=compute_{plain[-1]}")
        archs[archs.index(plain[-1])] += "+PTX"
    told = f'-DFASTPROMPT_CUDA_ARCHS="{";".join(archs)}"'
    flags = [*COMMON, *OPTIMIZED, "-I", str(ROOT / "csrc"), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link = [f"-Xcompiler={flag.replace(',', chr(92) + ',')}" for flag in shlex.split(os.environ.get("LDFLAGS", ""))]
    nvcc = cuda_compiler()
    linker = [*nvcc, "-shared", "--cudart", "static"]
    lines = [
        rule("compile", [*compiler(), *flags]),
        rule("device", [*nvcc, *NVCC, *codes, "-I", str(ROOT / "csrc")]),
        f"rule link\n  command = {shell(linker)} $in {shell(link)} -o $out\n  description = $out",
    ]
    objects = []
    for source in longest_first(sources):
        objects.append(f"{source.name}.o")
        device = source.suffix == ".cu"
        lines.append(
            build(objects[-1], "device" if device else "compile", source, [] if device else [*python_headers(), told])
        )
    return "\n".join([*lines, f"build {library}: link {' '.join(objects)}", ""])


def description() -> str:
    """README for a package index, which shows no files beside it: pictures go, links to files become their names."""
    text = re.sub(r"^!\[.*\n\n", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.sub(r"\[([^]\n]+)\]\((?![a-z]+:)([^)#\s]+)[^)\s]*\)", named, text)


def named(link: re.Match[str]) -> str:
    """What stands in place of a link to a file: what it says, and where that is in the repository."""
    return f"`{link[2]}`" if link[2].endswith(link[1]) else f"{link[1]} (`{link[2]}`)"


def rule(name: str, command: list[str]) -> str:
    """A rule of ninja that compiles a file and notes what it includes."""
    return (
        f"rule {name}\n  command = {shell(command)} $more -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = $out"
    )


def build(target: str, name: str, source: Path, more: list[str]) -> str:
    """A build statement of ninja."""
    return f"build {target}: {name} {escaped(str(ROOT / source), path=True)}\n  more = {shell(more)}"


def longest_first(sources: list[Path]) -> list[Path]:
    """What takes longest to compile starts first: code for GPUs, whose headers hold most of it."""
    return sorted(sources, key=lambda path: (path.suffix != ".cu", -(ROOT / path).stat().st_size))


def python_headers() -> list[str]:
    """Of Python and pybind11, elsewhere in every isolated build: for files that need them only."""
    import pybind11

    return [*includes(), "-isystem", pybind11.get_include()]


def shell(command: list[str]) -> str:
    """A command line as it stands in build.ninja."""
    return escaped(shlex.join(command))


def escaped(text: str, path: bool = False) -> str:
    """Text as ninja reads it; in a path blanks and colons mean something too."""
    text = text.replace("$", "$$")
    return text.replace(" ", "$ ").replace(":", "$:") if path else text


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
    long_description=description(),
    long_description_content_type="text/markdown",
)
