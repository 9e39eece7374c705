"""Notebooks as pages: their text, their code, and the outputs that are stored in them."""

import json
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """A notebook as Markdown; pictures stand in the page itself, described by the first comment of their cell."""
    cells = json.loads(path.read_text())["cells"]
    title, *rest = [part for cell in cells for part in _CELLS[cell["cell_type"]](cell)]
    download = f'<a href="{path.name}" download>{path.name}</a>: this page as a notebook, with the outputs below.'
    return "\n\n".join([title, download, *rest]) + "\n"


def _text(cell: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"])]


def _code(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    about = source.partition("\n")[0].removeprefix("# ")
    return [_fenced("python", source), *(_output(output, about) for output in cell["outputs"])]


def _output(output: dict[str, Any], about: str) -> str:
    """The richest form of an output that a page can show."""
    if output["output_type"] == "stream":
        return _fenced("text", "".join(output["text"]))
    data = output["data"]
    if "image/png" in data:
        return f"![{about}](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return _fenced("text", "".join(data["text/plain"]))


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


_CELLS = {"markdown": _text, "code": _code}
