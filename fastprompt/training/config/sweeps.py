"""`[sweep]`: every combination of its space, over every prompt of the file, checked like a prompt that was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastprompt.training.config.axes import SPACE, Axes
from fastprompt.training.config.problems import Problems
from fastprompt.training.config.prompts import PromptEntry, Source, fitting, prompt_entry
from fastprompt.training.config.tables import SweepTable
from fastprompt.training.sweep.space import combinations

Swept = tuple[int, str, dict[str, Any], PromptEntry]


def swept_entries(sources: Sequence[Source], sweep: SweepTable, axes: Axes, problems: Problems) -> list[Swept]:
    """For each candidate: the number of its prompt, its name, the values chosen for it, and what it is then.

    Every value that cannot be is reported at the line where it stands.
    """
    return [one for i, source in enumerate(sources) for one in _of_prompt(i, source, sweep, axes, problems)]


def _of_prompt(index: int, source: Source, sweep: SweepTable, axes: Axes, problems: Problems) -> Iterator[Swept]:
    base, data = str(source.values.get("name")), source.values.get("data")
    if "shares" in source.values:
        problems.add(source.origin(("shares",)), "a sweep tries prompts with virtual tokens of their own")
        return
    if isinstance(data, dict) and "validation" not in data:
        problems.add(source.origin(("data",)), "validation is missing: a sweep chooses by its score")
    chosen = combinations(axes, search=sweep.search, candidates=sweep.candidates or 16, seed=f"{sweep.seed}/{base}")
    seen: set[str] = set()
    for values in chosen:
        both = _with(source.all_values, values)
        made = prompt_entry({**both, "name": f"{base}-{len(seen)}"}, problems.below(_origin(source, values)))
        key = repr((made and made.config, both))
        if made is not None and key not in seen:
            seen.add(key)
            yield index, made.name, {k: v for k, v in values.items() if k in both}, made


def _with(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's values with others in place of some, without those that its method has no place for."""
    both = {**base, **values}
    fits = fitting(both.get("method"))
    if {"epochs", "steps"} & set(values):
        fits -= {"epochs", "steps"} - set(values)
    return {k: v for k, v in both.items() if k in fits}


def _origin(source: Source, values: Mapping[str, Any]) -> Any:
    """The way back to the document's keys from those of a candidate."""
    return lambda key: (*SPACE, key[0]) if key and key[0] in values else source.origin(key)
