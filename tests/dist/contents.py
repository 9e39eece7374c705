"""What the sdist and the wheels of `make wheels` hold, file by file."""

from __future__ import annotations

import os
import platform
import re
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
TOP = {"bench", "csrc", "docs", "fastprompt", "fastprompt.egg-info", "kernels", "requirements", "tests"}
TOP |= {".clang-format", "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile", "PKG-INFO", "README.md"}
TOP |= {"mkdocs.yml", "pyproject.toml", "setup.cfg", "setup.py"}
NATIVE = {".cpp", ".h", ".cu", ".cuh"}
BUILT = {".pyc", ".pyo", ".so", ".o"}
SOURCE_PATH = re.compile(
    rb"(?<![\w.])/[\w./+-]+\.(?:c|cc|cpp|h|hpp)\b"
)  # from the root on, as compilers write them down


@dataclass(frozen=True)
class Wheels:
    """The sdist, the wheel for every platform, and the one with C++ kernels for a `platform` (as pip calls it)."""

    folder: Path
    sdist: Path
    pure: Path
    native: Path
    platform: str


def check(dist: Path) -> Wheels:
    """What lies in `dist`, after a look into all of it."""
    (sdist,) = dist.glob("*.tar.gz")
    stem = sdist.name.removesuffix(".tar.gz")
    python = "cp{}{}".format(*sys.version_info)
    (pure,) = dist.glob(f"{stem}-py3-none-any.whl")
    (native,) = dist.glob(f"{stem}-{python}-{python}-manylinux_*_{platform.machine()}.whl")
    check_sdist(sdist, stem)
    check_wheel(pure, stem, extension=False)
    check_wheel(native, stem, extension=True)
    return Wheels(dist, sdist, pure, native, native.stem.rpartition("-")[2].partition(".")[0])


def check_sdist(sdist: Path, stem: str) -> None:
    with tarfile.open(sdist) as archive:
        held = {PurePosixPath(name).relative_to(stem) for name in archive.getnames()} - {PurePosixPath()}
    assert {path.parts[0] for path in held} == TOP, {path.parts[0] for path in held} ^ TOP
    hidden = [path for path in held if path.name.startswith(".") and path.name != ".clang-format"]
    assert not hidden and not any("__pycache__" in path.parts or path.suffix in BUILT for path in held), hidden
    sources = {p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in NATIVE}
    assert sources <= held, sources - held
    assert package() <= {str(path).replace("kernels/triton/", "fastprompt/_triton/") for path in held}


def check_wheel(wheel: Path, stem: str, extension: bool) -> None:
    """The package and nothing beside it, with one extension or none, marked as what it is."""
    held, info = names(wheel), f"{stem}.dist-info"
    described = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    due = package() | {f"{info}/{name}" for name in described} | libraries(held)
    assert held == due, held ^ due
    assert len(libraries(held)) == extension
    with zipfile.ZipFile(wheel) as archive:
        assert f"Root-Is-Purelib: {str(not extension).lower()}" in archive.read(f"{info}/WHEEL").decode()
        for library in libraries(held):
            check_library(archive.read(library))


def libraries(held: set[str]) -> set[str]:
    """The extensions among the names in a wheel."""
    return {name for name in held if re.fullmatch(r"fastprompt/_native\.cpython-.*\.so", name)}


def check_library(code: bytes) -> None:
    """Nothing in it tells of the machine that built it, and no symbols are left but those the loader needs."""
    assert not SOURCE_PATH.findall(code), SOURCE_PATH.findall(code)[:3]
    assert os.fsencode(ROOT) not in code and os.fsencode(tempfile.gettempdir()) not in code
    assert b".symtab" not in code and b".debug_" not in code


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def package() -> set[str]:
    """Every file of the package, as wheels name it."""
    files = {p for p in (ROOT / "fastprompt").rglob("*") if p.is_file() and p.suffix not in BUILT}
    kernels = {f"fastprompt/_triton/{p.name}" for p in (ROOT / "kernels" / "triton").glob("*.py")}
    return {p.relative_to(ROOT).as_posix() for p in files} | kernels
