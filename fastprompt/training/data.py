"""Examples from files, from memory or from the hub, as a `datasets.Dataset` with a task's columns."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.errors import ArgumentError
from fastprompt.prompts.base import check_int
from fastprompt.training import packages

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load(
    source: Any,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Examples of a task, wherever they are.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`; a list of dicts; a file (.jsonl, .json, .csv, .tsv, .parquet), a
            pattern with `*` or a list of files of one format; a folder that `save_to_disk` wrote; or a name on the hub.
        split: which part, as `datasets` writes it: "train", "train[:100]", "validation[10%:20%]"; of a source without
            splits, every name means all of it. None: the whole, or the only split.
        subset: configuration of a hub data set.
        columns: new names, `{"sentence": "text"}` renames `sentence`; a column that had the new name is dropped.
        limit: at most so many examples, the first ones.
    """
    data = _renamed(_loaded(source, split, subset), columns or {})
    if limit is not None:
        check_int("limit", limit, 1)
        data = data.select(range(min(limit, len(data))))
    return data


def class_names(examples: Dataset, column: str = "label") -> tuple[str, ...]:
    """The classes of a column: those its type names, or else all values it has, sorted; lists count by their values."""
    if column not in examples.column_names:
        raise ArgumentError(f"column {column!r} is missing, the data set has {_listed(examples.column_names)}")
    kind = examples.features[column]
    while not hasattr(kind, "names") and getattr(kind, "feature", None) is not None:
        kind = kind.feature
    if hasattr(kind, "names"):
        return tuple(kind.names)
    values: set[Any] = set()
    for value in examples[column]:
        values |= set(value) if isinstance(value, list) else {value}
    if any(not isinstance(value, (str, int)) for value in values):
        raise ArgumentError(f"column {column!r} has values that name no class, {sorted(map(repr, values))[0]} say")
    return tuple(map(str, sorted(values, key=lambda value: (isinstance(value, str), value))))


def _loaded(source: Any, split: str | None, subset: str | None) -> Dataset:
    packages.need("reading examples", "datasets")
    import datasets

    if isinstance(source, datasets.Dataset):
        return _part(source, split)
    if isinstance(source, datasets.DatasetDict):
        return _of_splits(source, split)
    if isinstance(source, (list, tuple)) and all(isinstance(row, Mapping) for row in source):
        return _part(_from_rows(source), split)
    if isinstance(source, (list, tuple)) and all(isinstance(name, (str, Path)) for name in source):
        return _part(_from_files([Path(name) for name in source]), split)
    if not isinstance(source, (str, Path)):
        raise ArgumentError(
            f"source is {type(source).__name__}, expected a datasets.Dataset, a list of dicts, a file or a hub name"
        )
    if files := _files(source):
        return _part(_from_files(files), split)
    if Path(source).is_dir() and any((Path(source) / n).exists() for n in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(source))
        return _of_splits(saved, split) if isinstance(saved, datasets.DatasetDict) else _part(saved, split)
    return _from_hub(str(source), split, subset)


def _files(source: str | Path) -> list[Path]:
    """The local files that `source` names; an error where it can mean nothing else and there are none."""
    path = Path(source)
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(source))) if Path(name).is_file()]
    if not found and (path.suffix in FORMATS or "*" in str(source)):
        raise ArgumentError(f"source is {str(source)!r}, and there is no such file")
    return found


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    import datasets

    try:
        return datasets.Dataset.from_list([dict(row) for row in rows])
    except (ValueError, TypeError) as error:  # pyarrow's errors are of these
        raise ArgumentError(f"source is a list whose dicts do not agree about their columns' types: {error}") from None


def _from_files(files: Sequence[Path]) -> Dataset:
    import datasets

    formats = {FORMATS.get(path.suffix) for path in files}
    named = _listed(str(path) for path in files)
    if len(formats) != 1 or None in formats:
        raise ArgumentError(f"source is {named}, expected files of one format, any of {', '.join(FORMATS)}")
    for path in files:
        if not path.is_file():
            raise ArgumentError(f"source is {str(path)!r}, and there is no such file")
    if not any(path.read_bytes()[:1] for path in files):
        return datasets.Dataset.from_dict({})
    options: dict[str, Any] = {"sep": "\t"} if files[0].suffix == ".tsv" else {}
    try:
        loaded = datasets.load_dataset(
            formats.pop(), data_files=[str(path) for path in files], split="train", **options
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError) as error:
        raise ArgumentError(f"source is {named}, which cannot be read: {error.__cause__ or error}") from None
    return loaded


def _from_hub(name: str, split: str | None, subset: str | None) -> Dataset:
    import datasets

    try:
        found = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # no network, no such data set, a wrong split or subset
        raise ArgumentError(
            f"source is {name!r}, which is no file or folder here, and the hub (or its cache on this machine) "
            f"does not give it: {error}"
        ) from None
    return _of_splits(found, None) if isinstance(found, datasets.DatasetDict) else found


def _of_splits(parts: Mapping[Any, Dataset], split: str | None) -> Dataset:
    """One split of several; None where there is only one."""
    if split is None:
        if len(parts) != 1:
            raise ArgumentError(f"split is None, expected one of {_listed(parts)}")
        return next(iter(parts.values()))
    names = {word.partition("[")[0].strip() for word in split.split("+")}
    if len(names) != 1 or not names <= set(parts):
        raise ArgumentError(f"split is {split!r}, expected one of {_listed(parts)}, or a part of it such as [:100]")
    return _part(parts[names.pop()], split)


def _part(data: Dataset, split: str | None) -> Dataset:
    """A part of all examples by the brackets of a split such as "train[:100]+train[-10:]"."""
    import datasets

    if split is None:
        return data
    name = split.partition("[")[0].strip() or "train"
    spec = "+".join(
        f"train{part.strip()[part.strip().find('[') :]}" if "[" in part else "train" for part in split.split("+")
    )
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": len(data)})
    except (ValueError, AssertionError) as error:
        raise ArgumentError(
            f"split is {split!r}, expected {name!r} or a part of it such as {name}[:100]: {error}"
        ) from None
    chosen = [i for piece in pieces for i in range(piece.from_ or 0, len(data) if piece.to is None else piece.to)]
    return data if len(chosen) == len(data) else data.select(chosen)


def _renamed(data: Dataset, columns: Mapping[str, str]) -> Dataset:
    if missing := [name for name in columns if name not in data.column_names]:
        raise ArgumentError(f"columns has {missing[0]!r}, expected one of {_listed(data.column_names)}")
    if len(set(columns.values())) != len(columns):
        raise ArgumentError(f"columns is {dict(columns)}, expected a new name at most once")
    moved = {old: new for old, new in columns.items() if old != new}
    return data.remove_columns([n for n in moved.values() if n in data.column_names and n not in moved]).rename_columns(
        moved
    )


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "no columns"
