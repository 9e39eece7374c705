"""What the pages say about speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.attention_cases import BASELINES
from bench.pages.results import Table, Tables, Values, bracketed, goal, ratio, record, records

MAIN_JOB = "main-job-cpu.jsonl"
ATTENTION = "prefix-attention-cpu.jsonl"
GRID = "prefix-attention-grid-cpu.jsonl"
MEMORY = "prefix-attention-memory-cpu.jsonl"
CHOSEN = "chosen-layers-cpu.jsonl"
ENGINE = "serving-engine-cpu.jsonl"
LOAD = "serving-load-cpu.jsonl"
RAY = "ray-cpu.jsonl"
REGISTRY = "registered-prompts-cpu.jsonl"
STORAGE = "bank-storage-cpu.jsonl"
_MIB = 2**20
_FORWARD = "forward of 8 x 128 tokens"
_OP_CASES = {
    "prefill, 8 rows x 128 tokens, one prompt of 64": "prefill B8 prompts1 P64 N128 12/12 D64 causal",
    "decoding, 32 rows of 4 prompts of 512": "decode B32 prompts4 P512 S512 16/16 D64",
}
_WAYS = {
    "SDPA on keys concatenated before the clock starts": "concatenated",
    "prompts copied for every row, concatenated, SDPA": "expanded",
}
_CEILING = "ceiling"  # not a baseline but the machine's limit


def readme() -> Table:
    """README's table: the whole model against PEFT and the bare backbone, and the op against SDPA and copies."""
    whole = [
        ("PEFT generating 32 tokens for 32 rows of 32 prefix prompts, switching adapters row by row",
         "fastprompt, one batch", "generate", "peft, row by row", "fastprompt"),
        ("fastprompt, the same", "the bare backbone on the same batch", "generate", "fastprompt", "bare"),
        (f"fastprompt's {_FORWARD} with Prompt Tuning", "the bare backbone", "forward", "fastprompt", "bare"),
        ("PEFT's, the same", "the bare backbone", "forward", "peft", "bare"),
        (f"fastprompt's {_FORWARD} with Prefix Tuning", "the bare backbone", "prefix", "fastprompt", "bare"),
        ("PEFT's, the same", "the bare backbone", "prefix", "peft", "bare"),
        ("generating with 1,000 prompts in the bank", "with 10", "bank", "1000 prompts", "10 prompts"),
    ]  # fmt: skip
    rows = [[what, base, bracketed(ratio(MAIN_JOB, *where))] for what, base, *where in whole]
    for about, case in _OP_CASES.items():
        spreads = {r["over"]: r["wall"] for r in record(ATTENTION, kind="case", case=case, dtype="fp32")["ratios"]}
        for how, baseline in _WAYS.items():
            rows.append([f"{about}: {how}", "`prefix_attention`", bracketed(spreads[baseline])])
    return [["time of", "over the time of", "ratio"], *rows]


def attention() -> Table:
    """Every case of the table of prefix-attention: each baseline's time over ours."""
    rows = []
    for case in records(ATTENTION, kind="case"):
        found = {r["over"]: f"{r['wall']['median']:.2f}{'' if r['quiet'] else ' (busy)'}" for r in case["ratios"]}
        rows.append([case["case"], case["dtype"], *(found.get(name, "") for name in BASELINES)])
    return [["case", "dtype", *BASELINES], *rows]


def missed() -> Table:
    """What that run missed of its targets."""
    rows = []
    for case in records(ATTENTION, kind="case"):
        for verdict in (v for v in case["verdicts"] if v["met"] is False):
            share = verdict["over"] == _CEILING
            what = f"share of the ceiling ({case['share']['bound']})" if share else f"`{verdict['over']}` / ours"
            form = ".0%" if share else ".2f"
            goal = f"{verdict['target']:.0%}" if share else f"{verdict['target']:g}"
            rows.append([case["case"], case["dtype"], what, f"{verdict['value']:{form}}", goal])
    return [["case", "dtype", "", "measured", "target"], *rows]


def slower() -> Table:
    """Shapes of the grid at which a contestant was faster than we are."""
    rows = [
        [case["case"], case["dtype"], f"`{r['over']}`", f"{r['wall']['median']:.2f}"]
        for case in records(GRID, kind="case")
        for r in case["ratios"]
        if r["wall"]["median"] < 1 and r["quiet"]
    ]
    return [["case", "dtype", "faster is", "its time over ours"], *rows]


def chosen_layers() -> Table:
    """The backward pass of a prompt in all layers and in the top quarter of them, by CPU time."""
    share = ratio(CHOSEN, "backward", "top quarter", "all layers", "cpu")["median"]
    goal = record(CHOSEN, kind="ratio")["target"].removeprefix("<= ")
    rows = []
    for name in ("all layers", "top quarter"):
        seconds = record(CHOSEN, kind="time", name=name)["cpu"]["median"]
        growth = record(CHOSEN, kind="memory", name=name)["bytes"] / _MIB
        beside = f": {share:.3f}x (target {goal})" if name == "top quarter" else ""
        rows.append([name, f"{seconds:.2f} s{beside}", f"{growth:,.0f} MiB"])
    return [["", "backward, CPU time", "growth of the process in one forward and backward"], *rows]


def engine() -> Table:
    """The serving engine against generate."""
    names = {
        "generate, no prompts": "`generate`, no prompts",
        "100000 prompts": "100,000 prompts",
        "10 prompts, again": "10 prompts, again",
    }
    noise = {"10 prompts, again": " (the noise)"}
    rows = [
        [
            r["case"],
            f"{names[r['over']]} / {r['under']}{noise.get(r['over'], '')}",
            bracketed(r["wall"]),
            goal(r["target"]),
        ]
        for r in records(ENGINE, kind="ratio")
    ]
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


def _prefill(dtype: str, pick: Callable[[Sequence[float]], float]) -> Callable[[], str]:
    """Of the three runs' ratios of causal prefill 8 x 128 over concatenated keys."""

    def found() -> str:
        case = "prefill B8 prompts1 P64 N128 12/12 D64 causal"
        files = (ATTENTION, "prefix-attention-cpu-run2.jsonl", "prefix-attention-cpu-run3.jsonl")
        runs = [record(file, kind="case", case=case, dtype=dtype) for file in files]
        return f"{pick([_over(run, 'concatenated') for run in runs]):.2f}"

    return found


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


def _over(case: dict[str, Any], baseline: str) -> float:
    value: float = next(r["wall"]["median"] for r in case["ratios"] if r["over"] == baseline)
    return value


def _grid_reference() -> str:
    return f"{min(_over(case, 'reference') for case in records(GRID, kind='case')):.2f}"


def _most_bytes() -> str:
    """The most that a call allocated or the process grew by, in MiB."""
    return f"{max(r['bytes'] for r in records(MEMORY, kind='memory')) / _MIB:g}"


TABLES: Tables = {
    "readme": readme,
    "prefix-attention": attention,
    "prefix-attention.missed": missed,
    "prefix-attention.slower": slower,
    "chosen-layers": chosen_layers,
    "serving-engine": engine,
    "serving-load": load,
    "serving-load.ratios": load_ratios,
    "ray-replicas": replicas,
    "registered-prompts": registry,
    "bank-storage": storage,
}
VALUES: Values = {
    "engine.large": _engine_ratio("large"),
    "engine.small": _engine_ratio("small"),
    "load.over-peft": _load_ratio("prompts / peft", ".1f"),
    "load.over-bare": _load_ratio("prompts / no prompts", ".2f"),
    "load.tenants": lambda: f"{record(LOAD, kind='load', kind_of_request='prompts')['distinct']}",
    "lease.ratio": lambda: bracketed(ratio(REGISTRY, "lease", "100000", "10")),
    "prefill.fp32.low": _prefill("fp32", min),
    "prefill.fp32.high": _prefill("fp32", max),
    "prefill.bf16.low": _prefill("bf16", min),
    "prefill.bf16.high": _prefill("bf16", max),
    "grid.shapes": lambda: f"{len(records(GRID, kind='case'))}",
    "grid.reference": _grid_reference,
    "memory.most": _most_bytes,
}
