"""The pages of the documentation, and what stands in them, for the tests that hold them to the truth."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "csrc" / "README.md",
    ROOT / "kernels" / "triton" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_SETTING = re.compile(r"[A-Z_]+=")  # before a command: OMP_NUM_THREADS=2 python ...


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every fenced block of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in found]


def languages(page: Path) -> set[str]:
    """Languages of a page's fenced blocks."""
    return {opened for opened, _ in re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)}


def prose(page: Path) -> str:
    """The page without its fenced blocks; of a notebook its text without code and outputs."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def table(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose first header cell is `first`."""
    lines = iter(page.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def shell_lines(page: Path) -> list[list[str]]:
    """Commands of a page's shell blocks as words, without what is set before them and what they are piped into."""
    found = []
    for _, text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split(" | "):
                words = shlex.split(part, comments=True)
                while words and _SETTING.match(words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Commands that the text shows between backticks, with at least a word behind the command."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.match(r"(?:[A-Z_]+=\S+ )*(?:python -m|fastprompt|make) ", code):
            words = shlex.split(code)
            while _SETTING.match(words[0]):
                words.pop(0)
            found.append(words)
    return found
