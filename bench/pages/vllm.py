"""What the pages say about prompts inside vLLM."""

from __future__ import annotations

from collections.abc import Mapping

from bench.pages.results import MIB, Table, Tables, bracketed, record

RUNS = "vllm-cpu.jsonl"
_CASES = {
    "resident": "`--case resident`: 8 prompts of 64 virtual tokens in it, against 64 tokens of text in it",
    "tails": "`--case tails`: prompts of 20, 50 and 100 virtual tokens, 4 to 20 of them written again for every row",
}
_LOOKS = {"500": 0, "10,000": 19, "20,000": 39}  # requests, and which of the forty looks at memory that was


def throughput() -> Table:
    """Time without prompts over that with prompts."""
    rows = []
    for case, about in _CASES.items():
        wall = record(RUNS, kind="ratio", case=case)["wall"]
        rows.append([about, bracketed(wall, ".2f"), str(wall["count"])])
    return [["32 rows of 33 new tokens of text and 32 answered", "time, without / with prompts", "pairs"], *rows]


def stream() -> Table:
    """The long stream of requests."""
    r = record(RUNS, kind="zipf")
    rows = [
        ["failed requests; answers compared with transformers, all equal", f"{r['failed']}; {r['answers checked']}"],
        ["prompts that came up", f"{r['asked for']:,}"],
        ["loads (a whole prefix or its tail) a request", f"{r['loads a request']:.2f}"],
        [
            "virtual tokens written, of those in front of all texts",
            f"{100 * r['virtual tokens written again']:.0f}%",
        ],
        ["time spent on it, of all", f"{100 * r['share of the time spent loading']:.1f}%"],
        ["first load of a prompt: file mapped, digest checked, written into all layers' pages", _ms(r["cold_load"])],
        ["load of a prompt that was read before", _ms(r["hot_load"])],
    ]
    for about, key in (("the process's own memory", "RssAnon"), ("mapped files, which may be dropped,", "RssFile")):
        seen = ", ".join(f"{r['memory'][look][key] / MIB:.0f}" for look in _LOOKS.values())
        rows.append([f"{about} after {', '.join(_LOOKS)} requests", f"{seen} MiB"])
    return [["`--case zipf`", ""], *rows]


def _ms(seconds: Mapping[str, float]) -> str:
    """A spread of seconds in milliseconds."""
    return f"{bracketed({name: 1e3 * value for name, value in seconds.items()}, '.2f')} ms"


TABLES: Tables = {"vllm": throughput, "vllm.stream": stream}
