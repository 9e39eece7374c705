"""What the pages say about quality on real weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

from bench.pages.results import Table, Tables, Values, record
from bench.quality import facts_part, report
from bench.quality.ledger import Ledger, Result
from bench.runs import RESULTS
from fastprompt import demo

SEARCH = "quality-search-cpu.jsonl"
_NAMES = {
    "clinc150": {
        "p_tuning_v2": "P-Tuning v2",
        "full": "full fine-tuning",
        "probe_mean": "linear probe on the mean",
        "probe": "linear probe on [CLS]",
    },
    "snips": {
        "p_tuning_v2": "P-Tuning v2",
        "full": "full fine-tuning",
        "probe": "linear probe on each word's first token",
    },
    "facts": {
        "p_tuning": "P-Tuning templates, six virtual tokens",
        "hand_written": "best hand-written template",
        "hand_written among objects": "best hand-written template, ranked among the relation's own objects only",
    },
}
_PROMPTS = ("p_tuning_v2", "p_tuning")
_WITHOUT_SEEDS = ("probe", "probe_mean", "hand_written", "hand_written among objects")


@cache
def results() -> list[Result]:
    """The scores of every way with the settings that it was last run with; of equal work the latest."""
    found = Ledger(RESULTS / "quality-cpu.jsonl").results
    settings = {(r.part, r.way): r.settings for r in found}
    own = [r for r in found if r.settings == settings[r.part, r.way]]
    return list({(r.part, r.way, r.task, r.seed): r for r in own}.values())


def lines(part: str, without: str | None = None) -> dict[str, report.Line]:
    """A part's ways, over all its tasks but one."""
    own = [r for r in results() if r.part == part and r.task != without]
    return {line.way: line for line in report.lines(own, {part: len({r.task for r in own})})}


def part_table(part: str, score: str, trained: str) -> Callable[[], Table]:
    """Ways of a part, with the targets for prompts; `trained` is what parameters are counted by."""

    def found() -> Table:
        known = lines(part)
        verdicts = {v.target.other: v for v in report.verdicts(list(known.values()))}
        rows = []
        for way, name in _NAMES[part].items():
            line = known[way]
            seeds = "-" if way in _WITHOUT_SEEDS else str(line.seeds)
            goal = _goal(verdicts[way]) if way in verdicts else ""
            rows.append([name, seeds, _score(line), goal, f"{line.parameters:,} parameters{trained}"])
        return [["way", "seeds", score, f"target for {next(iter(_NAMES[part].values()))}", ""], *rows]

    return found


def facts() -> Table:
    """P@1 of trained and of hand-written templates."""
    known = lines("facts")
    rows = [
        [name, "-" if way in _WITHOUT_SEEDS else str(known[way].seeds), _score(known[way])]
        for way, name in _NAMES["facts"].items()
    ]
    return [["way", "seeds", "P@1"], *rows]


def domains() -> Table:
    """CLINC150 domain by domain, and seed by seed."""
    ways = ("p_tuning_v2", "full", "probe_mean", "probe")
    rows = [[task, *(_by_seed("clinc150", way, task) for way in ways)] for task in _tasks("clinc150")]
    return [["domain", "P-Tuning v2", "full fine-tuning", "probe on the mean", "probe on [CLS]"], *rows]


def relations() -> Table:
    """Facts relation by relation, with how many there are in the test."""
    sizes = {relation.name: str(len(relation.test)) for relation in facts_part.relations(demo.tokenizer())}
    ways = ("hand_written", "p_tuning")
    rows = [[task, sizes[task], *(_by_seed("facts", way, task) for way in ways)] for task in _tasks("facts")]
    return [["relation", "test facts", "hand-written", "trained, seeds 0 / 1 / 2"], *rows]


def at_the_end(task: str) -> Callable[[], str]:
    """Test scores of a fact's prompts at their last evaluation, seed by seed."""
    return lambda: ", ".join(f"{100 * r.score.curve[-1][2]:.0f}" for r in _trained("facts") if r.task == task)


def curve(part: str, test: bool) -> Callable[[], str]:
    """Mean score of the prompts after each evaluation, over tasks and seeds."""

    def found() -> str:
        curves = [r.score.curve for r in _trained(part)]
        means = [statistics.fmean(points) for points in zip(*[[p[1 + test] for p in c] for c in curves], strict=True)]
        return ", ".join(f"{100 * mean:.1f}" for mean in means)

    return found


def without(domain: str, way: str) -> Callable[[], str]:
    """A way's mean over the other domains of CLINC150."""
    return lambda: f"{lines('clinc150', domain)[way].mean:.1f}"


def above(part: str, other: str) -> Callable[[], str]:
    """How far prompts are above another way, in points."""
    return lambda: f"{_verdict(part, other).difference:+.1f}"


def searched(group: str, **settings: float | str | None) -> Callable[[], str]:
    """Validation F1 after one epoch of a candidate for SNIPS."""
    wanted = {"virtual_tokens": 32, **settings}
    return lambda: f"{100 * record(SEARCH, kind='candidate', group=group, step=350, **wanted)['validation']:.1f}"


def starts() -> Table:
    """How a prompt starts, and what was varied beside that: validation F1 of SNIPS after one epoch."""
    spread = "first numbers drawn with a standard deviation of "
    found = {
        f"{spread}0.02": searched("init", init_std=0.02, **_SPREAD),
        f"{spread}0.3": searched("init", init_std=0.3, **_SPREAD),
        f"{spread}1.0": searched("init", init_std=1.0, **_SPREAD),
        "activations of words": searched("words", **_SPREAD, **_WORDS),
        "the same with dropout 0.1": searched("words", **_SPREAD, **_WORDS | {"dropout": 0.1}),
        "the same at rate 0.05": searched("around words", **_SPREAD | {"learning_rate": 0.05}, **_WORDS),
        "the same with 64 virtual tokens": searched("around words", virtual_tokens=64, **_SPREAD, **_WORDS),
        "words through an MLP, at rate 0.0003": searched(
            "around words", **_SPREAD | {"learning_rate": 0.0003}, **_WORDS | {"reparameterization": "mlp"}
        ),
    }
    return [
        ["32 virtual tokens, rate 0.03, 0.003 for the head", "F1"],
        *([name, score()] for name, score in found.items()),
    ]


def before(std: float) -> Callable[[], str]:
    """Test F1 of SNIPS' prompts by the recipe before this one, whose first numbers had this spread."""

    def found() -> str:
        every = Ledger(RESULTS / "quality-cpu.jsonl").results
        own = [r for r in every if (r.part, r.way) == ("snips", "p_tuning_v2")]
        scores = [100 * r.score.test for r in own if r.settings["config"]["init_std"] == std]
        return f"{statistics.fmean(scores):.1f} +- {statistics.stdev(scores):.1f} over {len(scores)} seeds"

    return found


def _verdict(part: str, other: str) -> report.Verdict:
    return next(v for v in report.verdicts(list(lines(part).values())) if v.target.other == other)


def _tasks(part: str) -> list[str]:
    return list(dict.fromkeys(r.task for r in _trained(part)))


def _trained(part: str) -> list[Result]:
    return [r for r in results() if r.part == part and r.way in _PROMPTS]


def _by_seed(part: str, way: str, task: str) -> str:
    own = sorted((r.seed, r.score.test) for r in results() if (r.part, r.way, r.task) == (part, way, task))
    return " / ".join(f"{100 * score:.1f}" for _, score in own)


def _score(line: report.Line) -> str:
    mean = f"**{line.mean:.1f}**" if line.way in _PROMPTS else f"{line.mean:.1f}"
    return mean + ("" if line.spread is None else f" +- {line.spread:.1f}")


def _goal(verdict: report.Verdict) -> str:
    points = verdict.target.points
    wanted = f"at least {points:g} above" if points > 0 else f"at most {-points:g} below"
    return f"{wanted}: {'met' if verdict.met else 'MISSED'}, {verdict.difference:+.1f}"


_RATES = {"head_learning_rate": 0.01, "init_std": 0.02}
_SPREAD = {"learning_rate": 0.03, "head_learning_rate": 0.003}
_WORDS = {"init": "activations", "dropout": None, "reparameterization": None}
TABLES: Tables = {
    "quality.clinc150": part_table("clinc150", "accuracy", " a domain"),
    "quality.clinc150.domains": domains,
    "quality.snips": part_table("snips", "F1", ""),
    "quality.snips.search": starts,
    "quality.facts": facts,
    "quality.facts.relations": relations,
}
VALUES: Values = {
    "clinc150.validation": curve("clinc150", test=False),
    "clinc150.test": curve("clinc150", test=True),
    "clinc150.without-banking.p_tuning_v2": without("banking", "p_tuning_v2"),
    "clinc150.without-banking.full": without("banking", "full"),
    "clinc150.without-banking.probe_mean": without("banking", "probe_mean"),
    "clinc150.without-banking.probe": without("banking", "probe"),
    "snips.validation": curve("snips", test=False),
    "snips.test": curve("snips", test=True),
    "snips.search.rate-0.01": searched("rates", learning_rate=0.01, **_RATES),
    "snips.search.rate-0.03": searched("rates", learning_rate=0.03, **_RATES),
    "snips.search.rate-0.1": searched("init", learning_rate=0.1, head_learning_rate=0.003, init_std=0.02),
    "snips.before": before(0.3),
    "facts.country.end": at_the_end("country"),
    "facts.above-hand-written": above("facts", "hand_written"),
    "clinc150.above-full": above("clinc150", "full"),
    "snips.above-full": above("snips", "full"),
}
