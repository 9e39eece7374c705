"""What mkdocs does to pages that are written to be read in the repository: README is the site's first page, notebooks
are pages, and links to files outside of `docs/` lead to copies of these files under `repository/`."""

import posixpath
import re
from pathlib import Path

import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README, notebooks as pages, and what pages link to outside of `docs/`."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        uri = in_site(str(path.relative_to(ROOT)))
        files.append(File.generated(config, uri, content=notebooks.page(path)))
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        place = in_repository(waiting.pop())
        for target in outside(place):
            uri = in_site(target)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target), inclusion=_NOT_IN_NAV))
                waiting += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as they are in the site."""
    uri = page.file.src_uri
    here = in_repository(uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        return posixpath.relpath(in_site(target), posixpath.dirname(uri) or ".")

    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def outside(place: str) -> set[str]:
    """Files outside of `docs/` that a page of the repository links to."""
    path = ROOT / place
    prose = _FENCE.sub("", notebooks.page(path) if path.suffix == ".ipynb" else path.read_text())
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(place), link)) for link in _LINK.findall(prose)}
    return {target for target in found if not target.startswith("docs/") and target != "README.md"}


def in_repository(uri: str) -> str:
    """Where a file of the site stands in the repository."""
    if uri == "index.md":
        return "README.md"
    if uri.startswith("repository/"):
        return uri.removeprefix("repository/")
    notebook = Path("docs", uri).with_suffix(".ipynb")
    return str(notebook) if (ROOT / notebook).exists() else f"docs/{uri}"


def in_site(path: str) -> str:
    """Where a file of the repository stands in the site."""
    if path == "README.md":
        return "index.md"
    if not path.startswith("docs/"):
        return f"repository/{path}"
    page = Path(path).with_suffix(".md") if path.endswith(".ipynb") else path
    return str(page).removeprefix("docs/")


_NOT_IN_NAV = InclusionLevel.NOT_IN_NAV
