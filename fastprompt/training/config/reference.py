"""The reference of config files: tables in Markdown, made from the models. `docs/config-files.md` holds them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from annotated_types import Ge, Gt, Lt
from pydantic.fields import FieldInfo

from fastprompt.prompts import METHODS
from fastprompt.training.config.fields import model_of, nothing
from fastprompt.training.config.tables import (
    ComparatorTable,
    DataTable,
    PromptTable,
    RangeTable,
    RunTable,
    SweepTable,
    Table,
)
from fastprompt.training.tasks import TASKS

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
_SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Lt: ("<", "lt")}
_TABLES: tuple[tuple[str, type[Table]], ...] = (
    ("`[run]`", RunTable),
    ("`[[prompt]]` and `[defaults]`", PromptTable),
    ("`[prompt.data]`", DataTable),
    ("`[[comparator]]`", ComparatorTable),
    ("`[sweep]`", SweepTable),
    ("A range in `[sweep.space]`", RangeTable),
)


def reference() -> str:
    """All tables, each under its heading."""
    parts = []
    for title, model in _TABLES:
        rows = [(*_cells(name, field), field.description or "") for name, field in _of(model)]
        parts.append(_section(title, ("key", "type", "default", "meaning"), rows))
        if model is PromptTable:
            parts.append(_section("Keys of methods", ("key", "type", "default", "methods"), _rows(METHODS)))
            parts.append(_section("Keys of tasks", ("key", "type", "default", "tasks"), _rows(TASKS)))
    return "\n".join(parts)


def _rows(classes: Mapping[str, type]) -> list[tuple[str, ...]]:
    """One row for each key with the same type and default, naming the classes that have it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for owner, cls in classes.items():
        for name, field in _of(model_of(cls)):
            rows.setdefault(_cells(name, field), []).append(f"`{owner}`")
    return [(*row, "all" if len(owners) == len(classes) else ", ".join(owners)) for row, owners in rows.items()]


def _cells(name: str, field: FieldInfo) -> tuple[str, ...]:
    return f"`{name}`", _type(field), _default(name, field)


def _of(model: type[Table]) -> Iterable[tuple[str, FieldInfo]]:
    return model.model_fields.items()


def _section(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join([f"## {title}", "", *lines, ""])


def _type(field: FieldInfo) -> str:
    words = _words(field.annotation)
    for bound in field.metadata:
        if type(bound) in _SIGNS:
            sign, name = _SIGNS[type(bound)]
            words += f" {sign} {getattr(bound, name):g}"
    return words


def _words(hint: Any) -> str:
    """A type in the words of TOML."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [f" {_SIGNS[type(b)][0]} {getattr(b, _SIGNS[type(b)][1]):g}" for b in _bounds(parts[1:])]
        return _words(parts[0]) + "".join(bounds)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts if part is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return "table"
    return _WORDS.get(hint, "any")


def _bounds(metadata: Iterable[Any]) -> list[Any]:
    """Bounds among the metadata of a type, those inside a pydantic Field too."""
    flat = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return [one for one in flat if type(one) in _SIGNS]


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.default
    if value is None:
        return f"`{nothing(name)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(repr, value))}]`"
    return "`{}`" if value == {} else f"`{value}`"
