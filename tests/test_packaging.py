"""What pyproject.toml says about the package agrees with the tree."""

import re
import runpy
import sys
from pathlib import Path

import setuptools

import fastprompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where the standard library has none

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def modules(folder: Path) -> bool:
    return any(folder.glob("*.py"))


def test_every_package_is_listed():
    folders = [p for p in (ROOT / "fastprompt", *(ROOT / "fastprompt").rglob("*")) if p.is_dir() and modules(p)]
    found = {".".join(p.relative_to(ROOT).parts) for p in folders}
    if modules(ROOT / "kernels" / "triton"):
        found.add("fastprompt._triton")
    assert set(SETUPTOOLS["packages"]) - {"fastprompt._triton"} == found - {"fastprompt._triton"}
    assert found <= set(SETUPTOOLS["packages"])


def test_data_is_there_and_no_source_is_left_out():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        assert all(any(folder.glob(pattern)) for pattern in patterns), package
    kept = (ROOT / "MANIFEST.in").read_text()
    assert "graft csrc" in kept and "graft kernels" in kept
    left_out = [words for line in kept.splitlines() if (words := line.split())[0].endswith("exclude")]
    assert not any(pattern in ("*.cu", "*.cuh", "*.cpp", "*.h", "*.json") for words in left_out for pattern in words)


def test_kernels_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_package_is_typed_and_has_a_version():
    assert (ROOT / "fastprompt" / "py.typed").is_file()
    assert fastprompt.__version__.count(".") == 2
    assert f"\nversion: {fastprompt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_description_for_a_package_index_needs_no_files_beside_it(monkeypatch):
    """README's words and code, with the names of files in place of links and pictures."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    text, readme = given["long_description"], (ROOT / "README.md").read_text()
    assert not re.search(r"!\[|\]\((?![a-z]+:)", text)
    fences = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert fences.findall(text) == fences.findall(readme)
    named = re.findall(r"`((?:docs|bench)/[\w./-]+)`", text)
    assert len(named) > 30 and all((ROOT / path).exists() for path in named)
