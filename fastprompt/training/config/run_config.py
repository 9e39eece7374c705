"""A whole config file, checked: every problem of it in one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastprompt.errors import FastPromptError
from fastprompt.folders import check_name
from fastprompt.training.config.axes import first_values, read_axes
from fastprompt.training.config.document import Document, read_document
from fastprompt.training.config.fields import with_nulls
from fastprompt.training.config.locate import KeyPath
from fastprompt.training.config.problems import Problems, checked, near, shown, unknown
from fastprompt.training.config.prompts import (
    PromptEntry,
    Source,
    all_merged,
    check_defaults,
    merged,
    origin_of,
    prompt_entry,
)
from fastprompt.training.config.sweeps import Swept, swept_entries
from fastprompt.training.config.tables import ComparatorTable, RunTable, SweepTable, Table

TABLES = ("run", "defaults", "prompt", "comparator", "sweep")
T = TypeVar("T", bound=Table)


@dataclass(frozen=True)
class RunConfig:
    """What a config file says; `sources` are those of `prompts`, in order, `candidates` those of a sweep."""

    document: Document = field(repr=False)
    run: RunTable
    prompts: tuple[PromptEntry, ...]
    comparators: tuple[ComparatorTable, ...]
    sweep: SweepTable | None
    candidates: tuple[Swept, ...]
    sources: tuple[Source, ...] = field(repr=False)

    @property
    def path(self) -> Path:
        return self.document.path

    def problems(self) -> Problems:
        """A fresh collection of problems with places in this file."""
        return Problems(self.document.place)

    def resolved(self, name: str) -> str:
        """A path relative to the file, or the name as it is if it is no path: a name on the hub, say."""
        path = Path(name).expanduser()
        here = self.path.parent / path
        local = here.exists() or name.startswith((".", "/", "~")) or path.suffix in _DATA
        return str(here) if local else name


_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def load_config(path: str | Path, overrides: Sequence[str] = (), *, sweep: bool = False) -> RunConfig:
    """Read and check a config file, with `key=value` overrides in place of what it says.

    With `sweep` a prompt may leave out what `[sweep.space]` gives; it has the first value then.
    Errors: ConfigError with all problems, each with file, line, key, what came and what was expected.
    """
    document = read_document(path, overrides)
    problems = Problems(document.place)
    values = document.values
    for name in set(values) - set(TABLES):
        problems.add((name,), unknown(name, TABLES, "a config file"))
    run = _table(RunTable, values.get("run"), ("run",), problems)
    swept = _table(SweepTable, values.get("sweep"), ("sweep",), problems) if "sweep" in values or sweep else None
    axes = {} if swept is None else read_axes(swept, problems)
    sources = _sources(values, problems, first_values(axes) if sweep else {})
    entries = [prompt_entry(source.values, problems.below(source.origin)) for source in sources]
    others = _tables(values, "comparator", problems)
    comparators = [_table(ComparatorTable, table, ("comparator", i), problems) for i, table in enumerate(others)]
    _check_together(entries, sources, others, problems)
    candidates = swept_entries(sources, swept, axes, problems) if sweep and swept is not None else []
    problems.raise_all()
    return RunConfig(
        document,
        _some(run),
        tuple(map(_some, entries)),
        tuple(map(_some, comparators)),
        swept,
        tuple(candidates),
        tuple(sources),
    )


def _some(value: T | PromptEntry | None) -> Any:
    assert value is not None, "every None has been reported"
    return value


def _table(model: type[T], values: Any, path: KeyPath, problems: Problems) -> T | None:
    if not isinstance(values, dict):
        came = "missing" if values is None else f"{shown(values)} came"
        problems.add(path, f"{came}: expected a table [{path[0]}]")
        return None
    return checked(
        model, with_nulls(model, values), lambda key, text: problems.add((*path, *key), text), f"[{path[0]}]"
    )


def _tables(values: Mapping[str, Any], name: str, problems: Problems) -> list[dict[str, Any]]:
    """The array of tables of this name."""
    tables = values.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        problems.add((name,), f"expected tables headed [[{name}]], in double brackets")
        return []
    return tables


def _sources(values: Mapping[str, Any], problems: Problems, first: Mapping[str, Any]) -> list[Source]:
    defaults = values.get("defaults", {})
    if not isinstance(defaults, dict):
        problems.add(("defaults",), f"{shown(defaults)} came, expected a table [defaults]")
        defaults = {}
    check_defaults(defaults, problems)
    tables = _tables(values, "prompt", problems)
    if not values.get("prompt"):
        problems.add((), "there is no [[prompt]]: expected at least one")
    known = {**first, **{k: v for k, v in defaults.items() if k not in first}}
    sources = []
    for i, own in enumerate(tables):
        origin = origin_of(defaults, own, ("prompt", i))
        back = partial(_origin, origin, set(first) - set(own))
        sources.append(Source(merged(known, own), all_merged(known, own), back))
    return sources


def _origin(origin: Callable[[KeyPath], KeyPath], swept: set[str], key: KeyPath) -> KeyPath:
    """The key of the document for a key of a prompt; `swept` ones come from the sweep's space."""
    return ("sweep", "space", str(key[0])) if key and key[0] in swept else origin(key)


def _check_together(
    entries: Sequence[PromptEntry | None],
    sources: Sequence[Source],
    comparators: Sequence[Mapping[str, Any]],
    problems: Problems,
) -> None:
    """What no table shows by itself: names, references, one class of backbone."""
    names = [str(source.values.get("name")) for source in sources]
    for i, (source, name) in enumerate(zip(sources, names, strict=True)):
        if name in names[:i]:
            problems.add(("prompt", i, "name"), f"{shown(name)} is the name of an earlier prompt too")
        try:
            check_name(name)
        except FastPromptError as error:
            problems.add(("prompt", i, "name"), str(error))
        shares = source.values.get("shares")
        others = list(
            dict.fromkeys(other for other, it in zip(names, sources, strict=True) if "shares" not in it.values)
        )
        if shares is not None and shares not in others:
            problems.add(
                source.origin(("shares",)),
                f"{shown(shares)} came, expected a prompt with virtual tokens of its own: "
                f"{', '.join(others) or 'there is none'}{near(shares, others)}",
            )
    for i, comparator in enumerate(comparators):
        if {"epochs", "steps"} <= set(comparator):
            problems.add(("comparator", i, "steps"), "epochs and steps came: expected one of them, or none")
        named = comparator.get("prompts")
        for name in named if isinstance(named, list) else ():
            if name not in names:
                problems.add(("comparator", i, "prompts"), f"there is no prompt {shown(name)}{near(name, names)}")
    _check_one_class(entries, sources, problems)


def _check_one_class(entries: Sequence[PromptEntry | None], sources: Sequence[Source], problems: Problems) -> None:
    """All tasks of a run need the same class of backbone."""
    known = [(entry, source) for entry, source in zip(entries, sources, strict=True) if entry is not None]
    for entry, source in known:
        first = known[0][0]
        if entry.task.auto_class != first.task.auto_class:
            problems.add(
                source.origin(("task", "type")),
                f"task {entry.task.name} needs a backbone of {entry.task.auto_class}, and prompt {shown(first.name)} "
                f"one of {first.task.auto_class}: train them in two runs",
            )
