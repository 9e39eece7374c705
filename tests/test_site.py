"""What the site is made of agrees with the tree; `make docs` builds it and follows its links."""

import re
from importlib import import_module

from doc_pages import NOTEBOOKS, ROOT

import fastprompt

DOCS = ROOT / "docs"
API = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def test_every_page_is_in_the_navigation_once():
    nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    pages |= {str(path.relative_to(DOCS).with_suffix(".md")) for path in NOTEBOOKS}
    assert sorted(nav) == sorted({*pages, "index.md"})


def test_every_picture_is_shown_and_says_what_it_is():
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *DOCS.rglob("*.md")))
    for path in DOCS.rglob("*.svg"):
        assert f"{path.name})" in text, path
        picture = path.read_text()
        assert ("<title>" in picture and "<desc>" in picture) or "matplotlib" in picture, path


def test_the_reference_has_every_public_name():
    shown = {name.rpartition(".")[2] for name in API}
    assert set(fastprompt.__all__) - {"__version__", "FastPromptError"} <= shown
    assert set(import_module("fastprompt.ops").__all__) <= shown


def test_what_the_reference_names_exists_and_is_described():
    for name in API:
        module, _, member = name.rpartition(".")
        found = import_module(name) if name == "fastprompt.errors" else getattr(import_module(module), member)
        assert found.__doc__, name


def test_the_citation_is_of_this_version():
    assert f"\nversion: {fastprompt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
