"""A shape of an op that is not attention, and one interleaved run of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import ceilings, measure
from bench.attention_baselines import Entry
from bench.attention_check import Truth, bounded
from bench.attention_inputs import DTYPES
from bench.ceilings import Work
from bench.op_run import OURS, OpOutcome, Settings, Verdict, judge, set_count, slack, spread, timed

Inputs = dict[str, Tensor]


class OpCase(ABC):
    """One shape; its baselines are measured beside ours, and each must be at least as slow."""

    op: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16")

    @property
    @abstractmethod
    def name(self) -> str:
        """All that distinguishes the shape, in one line."""

    @abstractmethod
    def shrunk(self) -> OpCase:
        """The same kind of case at a size that only shows that it runs."""

    @abstractmethod
    def inputs(self, dtype: torch.dtype) -> Inputs:
        """The tensors of a call by name, the same on every call."""

    @abstractmethod
    def ours(self, impl: str) -> Entry:
        """The op."""

    @abstractmethod
    def baselines(self) -> dict[str, Entry]:
        """Other ways to compute the same; the first, in the dtype of its inputs, sets the bound."""

    @abstractmethod
    def work(self, x: Inputs) -> Work:
        """What a call must do at least."""

    def copy(self, x: Inputs) -> Inputs:
        """The same numbers in other memory."""
        return {name: tensor.clone() for name, tensor in x.items()}


def run(case: OpCase, dtype: str, settings: Settings) -> OpOutcome:
    """Measures a case; raises `CheckFailed` where a contestant is wrong before or after it was timed."""
    x = case.inputs(DTYPES[dtype])
    right = _truth(case, x)
    entries = {OURS: case.ours(settings.impl)} | {n: e for n, e in case.baselines().items() if settings.wants(n)}
    if settings.impl != "reference" and settings.wants("reference"):
        entries["reference"] = case.ours("reference")

    def check(name: str, result: Any) -> dict[str, float]:
        entry = entries[name]
        return right.errors(f"{name} ({entry.about})", entry.named(result), slack(name, settings))

    for name, entry in entries.items():
        check(name, entry.build(x)())
    needed = case.work(x)
    count = set_count(needed.bytes, settings.rotate is not False, settings.quick)
    sets = [x, *(case.copy(x) for _ in range(1, count))]
    samples, last = timed({name: [entry.build(each) for each in sets] for name, entry in entries.items()}, settings)
    errors = {name: check(name, last[name]) for name in entries}
    ratios = [measure.ratio(samples, name, OURS) for name in entries if name != OURS]
    time = spread(samples[OURS], settings.clock)
    share = ceilings.share(needed, time.median, settings.ceilings, dtype)
    verdicts = [judge(ratio, 1.0, settings) for ratio in ratios] + [Verdict("ceiling", share.share, None, None)]
    about = {name: entry.about for name, entry in entries.items()}
    return OpOutcome(case, dtype, len(sets), time, about, errors, samples, ratios, share, verdicts)


def _truth(case: OpCase, x: Inputs) -> Truth:
    """The oracle in float64, and the first baseline in the dtype for the bound."""
    oracle, plain = case.ours("reference"), next(iter(case.baselines().values()))
    wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    exact, usual = (entry.named(entry.build(inputs)()) for entry, inputs in ((oracle, wide), (plain, x)))
    return bounded(exact, usual)
