"""Docstrings as the site shows them: what stands under "Semantics" is code."""

import re
import textwrap
from typing import Any

import griffe

_SEMANTICS = re.compile(r"^(Semantics[^\n]*?):{1,2}\n+((?: {4,}[^\n]*\n+)*? {4,}[^\n]*)(?=\n+\S|\s*\Z)", re.MULTILINE)


class Semantics(griffe.Extension):
    """Fences the indented lines under "Semantics"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object once it is loaded."""
        if obj.docstring:
            obj.docstring.value = _SEMANTICS.sub(fenced, obj.docstring.value)


def fenced(found: re.Match[str]) -> str:
    """Title and lines as a paragraph and a fenced block."""
    return f"**{found[1]}**\n\n```text\n{textwrap.dedent(found[2])}\n```\n"
