"""What the pages say about the whole model and about attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.attention_cases import BASELINES
from bench.pages.results import MIB, Table, Tables, Values, bracketed, over, paired, ratio, record, records

MAIN_JOB = "main-job-cpu.jsonl"
ATTENTION = "prefix-attention-cpu.jsonl"
GRID = "prefix-attention-grid-cpu.jsonl"
MEMORY = "prefix-attention-memory-cpu.jsonl"
CHOSEN = "chosen-layers-cpu.jsonl"
LAUNCH = "launch-cost-cpu.jsonl"
_FORWARD = "forward of 8 x 128 tokens"
_BARE = "the same batch without prompts, in transformers"
_PREFILL = "prefill B8 prompts1 P64 N128 12/12 D64 causal"
_OP_CASES = {
    "prefill of 8 x 128 tokens, one prompt": _PREFILL,
    "decoding 32 rows of 4 prompts of 512": "decode B32 prompts4 P512 S512 16/16 D64",
}
_WAYS = {
    "SDPA on keys concatenated before the clock starts": "concatenated",
    "prompts copied for every row, concatenated, SDPA": "expanded",
}
_CEILING = "ceiling"  # not a baseline but the machine's limit


def readme() -> Table:
    """README's table: what others take, in units of fastprompt's time, for the whole model and for the op alone."""
    whole = [
        ("generate 32 tokens for 32 rows under 32 prefix prompts", "generate", "fastprompt",
         {"PEFT row by row, as one adapter is active at a time": "peft, row by row", _BARE: "bare"}),
        (f"{_FORWARD}, one Prompt Tuning prompt", "forward", "fastprompt", {"PEFT": "peft", _BARE: "bare"}),
        (f"{_FORWARD}, one Prefix Tuning prompt", "prefix", "fastprompt", {"PEFT": "peft", _BARE: "bare"}),
        ("generate with 1,000 prompts in the bank", "bank", "1000 prompts", {"with 10 in it": "10 prompts"}),
    ]  # fmt: skip
    rows: list[list[str]] = []
    for about, case, ours, others in whole:
        rows += _beside(about, {how: paired(MAIN_JOB, case, name, ours) for how, name in others.items()})
    for about, case in _OP_CASES.items():
        spreads = {r["over"]: r["wall"] for r in record(ATTENTION, kind="case", case=case, dtype="fp32")["ratios"]}
        rows += _beside(f"`prefix_attention`, {about}", {how: spreads[name] for how, name in _WAYS.items()})
    return [["what", "beside it", "takes, in units of fastprompt's time"], *rows]


def _beside(what: str, spreads: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A line for each that is beside `what`, which the first one names."""
    return [["" if i else what, how, bracketed(found, ".2f")] for i, (how, found) in enumerate(spreads.items())]


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
        growth = record(CHOSEN, kind="memory", name=name)["bytes"] / MIB
        beside = f": {share:.3f}x (target {goal})" if name == "top quarter" else ""
        rows.append([name, f"{seconds:.2f} s{beside}", f"{growth:,.0f} MiB"])
    return [["", "backward, CPU time", "growth of the process in one forward and backward"], *rows]


def _prefills(dtype: str) -> list[dict[str, Any]]:
    """The three runs' lines of causal prefill 8 x 128."""
    files = (ATTENTION, "prefix-attention-cpu-run2.jsonl", "prefix-attention-cpu-run3.jsonl")
    return [record(file, kind="case", case=_PREFILL, dtype=dtype) for file in files]


def _prefill(dtype: str, pick: Callable[[Sequence[float]], float]) -> Callable[[], str]:
    """Of the three runs' ratios of that case over concatenated keys."""
    return lambda: f"{pick([over(run, 'concatenated') for run in _prefills(dtype)]):.2f}"


def _apart() -> str:
    """How far our times of that case in the three runs are apart, in the dtype in which it is more."""
    times = [[run["times"]["ours"]["wall"]["median"] for run in _prefills(dtype)] for dtype in ("fp32", "bf16")]
    return f"{max(max(each) / min(each) for each in times) - 1:.0%}"


def _launch(way: str) -> Callable[[], str]:
    return lambda: f"{1e6 * record(LAUNCH, kind='time', name=way)['cpu']['median']:.1f} us"


def _grid_reference() -> str:
    return f"{min(over(case, 'reference') for case in records(GRID, kind='case')):.2f}"


def _most_bytes() -> str:
    """The most that a call allocated or the process grew by, in MiB."""
    return f"{max(r['bytes'] for r in records(MEMORY, kind='memory')) / MIB:g}"


TABLES: Tables = {
    "readme": readme,
    "prefix-attention": attention,
    "prefix-attention.missed": missed,
    "prefix-attention.slower": slower,
    "chosen-layers": chosen_layers,
}
VALUES: Values = {
    "prefill.fp32.low": _prefill("fp32", min),
    "prefill.fp32.high": _prefill("fp32", max),
    "prefill.bf16.low": _prefill("bf16", min),
    "prefill.bf16.high": _prefill("bf16", max),
    "prefill.ours.apart": _apart,
    "launch.triton": _launch("by Triton"),
    "launch.remembered": _launch("remembered"),
    "grid.shapes": lambda: f"{len(records(GRID, kind='case'))}",
    "grid.reference": _grid_reference,
    "memory.most": _most_bytes,
}
