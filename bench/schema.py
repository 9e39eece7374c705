"""The one schema of all results: JSON lines, each of a kind, and what a line of a kind says.

A file holds runs. A run begins with its `machine` line, which names the benchmark and says where it ran. Times are in
seconds, memory is in bytes. `SCHEMA` in `bench/measure.py` rises when a field changes its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_check import records
from bench.measure import SCHEMA


@dataclass(frozen=True)
class Maybe:
    """A value of this shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Map:
    """An object of any names, all of whose values have this shape."""

    shape: Any


@dataclass(frozen=True)
class Many:
    """A list of values of this shape."""

    shape: Any


NUMBER = (int, float)
SPREAD = {"median": NUMBER, "p20": NUMBER, "p80": NUMBER, "low": NUMBER, "count": int}
CLOCKS = {"wall": SPREAD, "cpu": SPREAD}
_RATIO = {"over": str, "under": str, **CLOCKS, "quiet": bool}
_CEILING = {"rate": NUMBER, "how": str, "quiet": bool}
_CASE = {
    "op?": str, "case": str, "dtype": str, "buffers": str, "about": Map(str), "errors": Map(Map(NUMBER)),
    "times": Map(CLOCKS), "ratios": Many(_RATIO),
    "share": {"gflops": NUMBER, "gbs": NUMBER, "floor": NUMBER, "share": NUMBER, "bound": str},
    "verdicts": Many({"over": str, "value": NUMBER, "target": Maybe(NUMBER), "met": Maybe(bool)}),
}  # fmt: skip

ANY = "any further fields"
FORMS: Mapping[str, tuple[Mapping[str, Any], ...]] = {  # a name that ends in "?" may be absent
    "machine": (
        {
            "benchmark": str, "quick?": bool, "time": str, "cpu": str, "cores": int, "threads": int, "capability": str,
            "python": str, "versions": Map(Maybe(str)), "commit": Maybe(str), "load": Many(NUMBER),
            "wait_policy": Maybe(str), ANY: None,
        },
    ),
    "ceilings": ({"memory": _CEILING, "matrix": Map(_CEILING)},),
    "check": (
        {"case": str, "green": bool, "what": str, "compared": int, "worst?": NUMBER},
        {"case?": str, "dtype?": str, "green": bool, "error": str},
    ),
    "sample": ({"case": str, "name": str, "round": int, **dict.fromkeys(("wall", "cpu", "others", "waited"), NUMBER)},),
    "time": ({"case": str, "name": str, **CLOCKS},),
    "ratio": (
        {"case": str, "target?": Maybe(str), "met?": Maybe(bool), **_RATIO},
        {"case": str, "what": str, "value": SPREAD, "target": Maybe(str), "met": Maybe(bool)},
    ),
    "case": (_CASE,),
    "point": (
        {"law": str, "x": NUMBER, "y?": NUMBER, "allocated?": Map(int), **_CASE},
        {
            "law": str, "x": NUMBER, "case": str, "dtype": str, "times": Map(CLOCKS), "quiet": bool, "worst": NUMBER,
            "allocated": Map(int),
        },
    ),
    "fit": (
        {
            "law": str, "name": str, "quantity": str, "part": str, "exponent": NUMBER, "error": NUMBER, "points": int,
            "first": NUMBER, "last": NUMBER,
        },
    ),
    "seconds": ({"names": int, "what": str, **SPREAD},),
    "pauses": ({"what": str, "count": int, "p50": NUMBER, "p99": NUMBER, "longest": NUMBER},),
    "rounding": ({"prompts": str, "storage": str, "error": NUMBER, "same": NUMBER, "places": int},),
    "load": (
        {
            "kind_of_request": str, "requests": int, "errors": int, "tokens_per_second": SPREAD,
            "first_token_p50": NUMBER, "first_token_p99": NUMBER, "distinct": int,
        },
    ),
    "memory": (
        {"what": str, "bytes": int, "most": int, "met": bool},
        {"case": str, "name": str, "bytes": Many(int)},
        {"name": str, "bytes": int},
        {"samples": Many(Many(NUMBER))},
    ),
    "memory ratio": (
        {"case": str, "over": str, "under": str, "ratio": NUMBER, "target": Maybe(str), "met": Maybe(bool)},
    ),
    "quickstart": ({"seconds": Map(NUMBER), "total": NUMBER, "most": NUMBER, "met": bool},),
    "replicas": (
        {
            "phase": str, "affinity": NUMBER, "slowest": NUMBER, "met": Maybe(bool),
            **dict.fromkeys(("requests", "streamed", "failed", "wrong", "resumed", "tenants", "replicas"), int),
        },
    ),
    "zipf": (
        {
            "case": str, "memory": Many(Map(NUMBER)), "growth": NUMBER, "cold_load": SPREAD, "hot_load": SPREAD,
            "failed": int, ANY: None,
        },
    ),
    "score": (
        {
            "part": str, "way": str, "task": str, "seed": int, "settings": Map(object),
            "score": {
                "validation": NUMBER, "test": NUMBER, "metric": str, "parameters": int, "seconds": NUMBER,
                "curve": Many(Many(NUMBER)), "remark": str,
            },
        },
    ),
    "candidate": ({"group": str, "step": int, "validation": NUMBER, ANY: None},),
    "end": ({"load": Many(NUMBER)},),
}  # fmt: skip


def problem(line: Mapping[str, Any], benchmark: str | None = None) -> str | None:
    """What is wrong with a line of a run of a benchmark, or None; `gpu-check` has kinds of its own."""
    if benchmark == "gpu-check":
        return records.problem(line)
    if line.get("schema") != SCHEMA:
        return f"schema is {line.get('schema')!r}, expected {SCHEMA}"
    kind = str(line.get("kind"))
    if kind not in FORMS:
        return f"kind is {kind!r}, expected one of {', '.join(FORMS)}"
    body = {name: value for name, value in line.items() if name not in ("schema", "kind")}
    found = [_mismatch(body, form, f"a {kind} line") for form in FORMS[kind]]
    return None if None in found else min(filter(None, found), key=lambda why: (_of_fields(why), len(why)))


def problems(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the lines of a file, each with its number."""
    found, benchmark = [], None
    for number, line in enumerate(lines, 1):
        if line.get("kind") == "machine":
            benchmark = line.get("benchmark")
        wrong = "it comes before any machine line" if benchmark is None else problem(line, benchmark)
        if wrong is not None:
            found.append(f"line {number}: {wrong}")
    return found


def _mismatch(value: Any, shape: Any, where: str) -> str | None:
    """How a value differs from a shape: types, `Maybe`, `Map`, `Many`, or an object's fields."""
    if isinstance(shape, Maybe):
        return None if value is None else _mismatch(value, shape.shape, where)
    if isinstance(shape, Map):
        inner = (
            [(value[name], shape.shape, f"{where}: {name}") for name in value] if isinstance(value, Mapping) else None
        )
    elif isinstance(shape, Many):
        inner = (
            [(x, shape.shape, f"{where}: item {i}") for i, x in enumerate(value)] if isinstance(value, list) else None
        )
    elif isinstance(shape, Mapping):
        wrong = _fields(value, shape, where)
        if wrong is not None:
            return wrong
        known = {name.removesuffix("?"): each for name, each in shape.items()}
        inner = [(value[name], known[name], f"{where}: {name}") for name in value if name in known]
    else:
        right = isinstance(value, shape) and not (isinstance(value, bool) and bool is not shape and shape is not object)
        return None if right else f"{where} is {value!r}"
    if inner is None:
        return f"{where} is {value!r}"
    return next((wrong for each in inner if (wrong := _mismatch(*each)) is not None), None)


def _of_fields(why: str) -> bool:
    """Whether a line has other fields than a form, rather than the same with a wrong value."""
    return " lacks " in why or why.endswith(" too")


def _fields(value: Any, shape: Mapping[str, Any], where: str) -> str | None:
    """Fields that an object lacks or has beyond those of its shape."""
    if not isinstance(value, Mapping):
        return f"{where} is {value!r}"
    needed = {name for name in shape if not name.endswith("?") and name != ANY}
    missing, more = needed - value.keys(), value.keys() - {name.removesuffix("?") for name in shape}
    if missing:
        return f"{where} lacks {', '.join(sorted(missing))}"
    return f"{where} has {', '.join(sorted(more))} too" if more and ANY not in shape else None
