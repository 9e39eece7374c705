"""What the pages say about serving: the engine, the server under load, replicas, the registry, 8-bit copies."""

from __future__ import annotations

from collections.abc import Callable

from bench.pages.results import Table, Tables, Values, bracketed, goal, ratio, record, records

ENGINE = "serving-engine-cpu.jsonl"
LOAD = "serving-load-cpu.jsonl"
RAY = "ray-cpu.jsonl"
FAIRNESS = "serving-fairness-cpu.jsonl"
REGISTRY = "registered-prompts-cpu.jsonl"
STORAGE = "bank-storage-cpu.jsonl"


def engine() -> Table:
    """The serving engine against generate."""
    names = {"generate, no prompts": "`generate`, no prompts", "100000 prompts": "100,000 prompts"}
    noise = {"10 prompts, again": " (the noise)"}
    rows = []
    for r in records(ENGINE, kind="ratio"):
        over, under = r["over"], r["under"]
        what = f"{names.get(over, over)} / {under}{noise.get(over, '')}"
        rows.append([r["case"], what, bracketed(r["wall"]), goal(r["target"])])
    return [["case", "ratio of times", "", "target"], *rows]


def load() -> Table:
    """Requests of every kind that the server under load answered."""
    rows = []
    for kind, name in (("prompts", "prompts"), ("no prompts", "no prompts"), ("peft", "PEFT")):
        r = record(LOAD, kind="load", kind_of_request=kind)
        tenants = "" if kind == "no prompts" else f" of {r['distinct']} tenants"
        waits = f"{1e3 * r['first_token_p50']:,.0f} ms, {1e3 * r['first_token_p99']:,.0f} ms"
        rate = f"{r['tokens_per_second']['median']:,.0f}"
        rows.append([name, f"{r['requests']:,}{tenants}", str(r["errors"]), rate, waits])
    return [["requests", "answered", "failed", "tokens a second", "first token, median and 99th percentile"], *rows]


def fairness() -> Table:
    """First tokens and throughput of tenants that share a server."""
    rows = []
    for r in records(FAIRNESS, kind="load"):
        waits = (f"{1e3 * r[f'first_token_{point}']:,.0f} ms" for point in ("p50", "p99"))
        rate = f"{r['tokens_per_second']['median']:,.0f}"
        rows.append([r["kind_of_request"], f"{r['requests']:,}", str(r["errors"]), rate, *waits])
    return [["tenant", "answered", "failed", "tokens a second", "first token, median", "99th percentile"], *rows]


def fairness_ratios() -> Table:
    """What one tenant gets beside another."""
    rows = [[r["what"], bracketed(r["value"], ".2f"), goal(r["target"])] for r in records(FAIRNESS, kind="ratio")]
    return [["ratio, by slices", "", "target"], *rows]


def load_ratios() -> Table:
    """What the server under load is judged by."""
    shown = {
        "prompts / no prompts": ("throughput, prompts / no prompts", ".3f"),
        "prompts / peft": ("throughput, prompts / PEFT", ".2f"),
        "memory, second half / first": ("memory, second half / first, after the first quarter", ".3f"),
    }
    rows = []
    for r in records(LOAD, kind="ratio"):
        what, form = shown[r["what"]]
        rows.append([what, bracketed(r["value"], form), goal(r["target"])])
    return [["ratio, by slices", "", "target"], *rows]


def replicas() -> Table:
    """Requests through two fronts while a replica is killed."""
    phases = {
        "before": "before",
        "kill": "the busier replica gets kill -9 in the midst",
        "after": "after, two replicas again",
    }
    rows = []
    for phase, name in phases.items():
        r = record(RAY, kind="replicas", phase=phase)
        counts = [str(r[key]) for key in ("failed", "wrong", "resumed")]
        rows.append([name, f"{r['requests']} of {r['tenants']} tenants", *counts, f"{100 * r['affinity']:g}%"])
    head = ["phase", "requests", "failed", "wrong", "streams that another replica went on with"]
    return [[*head, "at their tenant's replica"], *rows]


def registry() -> Table:
    """What a registry's calls cost with 10 and with 100,000 names."""
    calls = {
        "opening the registry": "open",
        "`refresh()` after a change": "refresh, the folder changed",
        "`refresh()`, nothing changed": "refresh, nothing changed",
        "a page of 100 names": "a page of 100 names",
        "`current(name)`, first time": "current, first time",
        "`current(name)`, again": "current, again",
    }
    rows = [[shown, *(_seconds(_median(what, n)) for n in (10, 100_000))] for shown, what in calls.items()]
    lease = [record(REGISTRY, kind="time", case="lease", name=name)["wall"]["median"] for name in ("10", "100000")]
    rows.append(["lease of a resident prompt, taken and given back", *map(_seconds, lease)])
    return [["", "N = 10", "N = 100,000"], *rows]


def steps() -> Table:
    """Decoding steps beside a look through a folder of 100,000 names."""
    rows = []
    for r in records(REGISTRY, kind="pauses"):
        rows.append([r["what"], str(r["count"]), *(f"{1e3 * r[point]:.1f} ms" for point in ("p50", "p99", "longest"))])
    return [["", "steps", "median", "99th percentile", "longest"], *rows]


def _median(what: str, names: int) -> float:
    median: float = record(REGISTRY, kind="seconds", what=what, names=names)["median"]
    return median


def _seconds(value: float) -> str:
    """In microseconds or milliseconds, to a tenth below 20."""
    number, unit = (1e6 * value, "us") if value < 1e-3 else (1e3 * value, "ms")
    return f"{number:.1f} {unit}" if number < 20 else f"{number:,.0f} {unit}"


def _load_ratio(what: str, form: str) -> Callable[[], str]:
    return lambda: f"{record(LOAD, kind='ratio', what=what)['value']['median']:{form}}"


def _engine_ratio(case: str) -> Callable[[], str]:
    return lambda: f"{ratio(ENGINE, case, 'generate, no prompts', 'engine, 7 prompts')['median']:.2f}"


def storage() -> Table:
    """What 8-bit copies of prompts do to the logits."""
    rows = {
        "instructions, random texts": "the tasks' instructions, compiled; random tokens",
        "instructions, their inputs": "the same; the tasks' own inputs",
        "normal, random texts": "standard normal keys and values; random tokens",
    }
    kinds = ("int8", "fp8")
    found = {
        (name, kind): record(STORAGE, kind="rounding", prompts=name, storage=kind) for name in rows for kind in kinds
    }
    table = [["prompts and texts", *kinds]]
    for name, shown in rows.items():
        cells = (found[name, kind] for kind in kinds)
        table.append([shown, *(f"{cell['error']:.1%}, {cell['same']:.1%}" for cell in cells)])
    return table


TABLES: Tables = {
    "serving-engine": engine,
    "serving-load": load,
    "serving-load.ratios": load_ratios,
    "serving-fairness": fairness,
    "serving-fairness.ratios": fairness_ratios,
    "ray-replicas": replicas,
    "registered-prompts": registry,
    "registered-prompts.steps": steps,
    "bank-storage": storage,
}
VALUES: Values = {
    "engine.large": _engine_ratio("large"),
    "engine.small": _engine_ratio("small"),
    "load.over-peft": _load_ratio("prompts / peft", ".1f"),
    "load.over-bare": _load_ratio("prompts / no prompts", ".2f"),
    "load.tenants": lambda: f"{record(LOAD, kind='load', kind_of_request='prompts')['distinct']}",
    "lease.ratio": lambda: bracketed(ratio(REGISTRY, "lease", "100000", "10")),
}
