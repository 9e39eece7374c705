"""One case of prefix attention in one dtype: every contestant checked, then timed in turns, then judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import attention_baselines as baselines
from bench import ceilings, measure, paged_prefix_attention
from bench.attention_baselines import Entry, Form
from bench.attention_cases import Case
from bench.attention_check import Truth, truth
from bench.attention_inputs import Inputs, build
from bench.ceilings import Share
from bench.op_run import OURS, SAMPLE, OpOutcome, Settings, Verdict, judge, set_count, slack, spread, timed

_SHORTEST = 50e-6  # seconds of a floor below which the call's own cost counts and the share has no target
_OF_CEILING = {"memory": 0.7, "compute": 0.6}


def run(case: Case, dtype: str, settings: Settings) -> OpOutcome:
    """Measures a case; raises `CheckFailed` where a contestant is wrong before or after it was timed."""
    inputs = build(case, dtype)
    right = truth(case, inputs)
    needed = ceilings.work(case, inputs)
    entries = _entries(case, inputs, right, settings)
    sets = [inputs, *(inputs.copy() for _ in range(1, _set_count(case, needed.bytes, settings)))]
    turns = {}
    for name, entry in entries.items():
        size = _concatenated_bytes(case, inputs) if name in ("concatenated", "explicit") else needed.bytes
        turns[name] = [entry.build(x) for x in sets[: _set_count(case, size, settings)]]
    samples, last = timed(turns, settings)
    errors = {name: _check(right, name, entry, last[name], settings) for name, entry in entries.items()}
    ratios = [measure.ratio(samples, name, OURS) for name in entries if name != OURS]
    time = spread(samples[OURS], settings.clock)
    share = ceilings.share(needed, time.median, settings.ceilings, dtype)
    verdicts = [judge(ratio, case.least(ratio.over, dtype), settings) for ratio in ratios]
    verdicts.append(_judge_share(case, dtype, share, settings, all(ratio.quiet for ratio in ratios)))
    about = {name: entry.about for name, entry in entries.items()}
    return OpOutcome(case, dtype, len(sets), time, about, errors, samples, ratios, share, verdicts)


def _entries(case: Case, inputs: Inputs, right: Truth, settings: Settings) -> dict[str, Entry]:
    """Who takes part, ours first: of each kind of baseline the quickest form, found by a short look."""
    own = paged_prefix_attention if case.paged else baselines
    entries = {OURS: own.ours(case, settings.impl)}
    _check(right, OURS, entries[OURS], entries[OURS].build(inputs)(), settings)
    if any(map(settings.wants, ("concatenated", "explicit", "expanded"))):
        forms = {form.about: form for form in baselines.forms(case, inputs.mask, inputs.q.dtype)}
        ready = {n: baselines.concatenated(case, form) for n, form in forms.items()}
        quickest = [forms[n] for n in _ranked(right, inputs, ready, settings)]
        serves = next(form for form in quickest if _as_peft(form))
        entries["concatenated"] = baselines.concatenated(case, next(form for form in quickest if form.sdpa))
        entries["explicit"] = baselines.concatenated(case, next(form for form in quickest if not form.sdpa))
        entries["expanded"] = own.expanded(case, serves)
    folded = baselines.folded(case, inputs)
    if folded is not None:
        entries["folded"] = folded
    if settings.impl != "reference":
        entries["reference"] = own.ours(case, "reference")
    entries = {name: entry for name, entry in entries.items() if name == OURS or settings.wants(name)}
    if settings.wants("single pass", usual=False):
        entries["single pass"] = baselines.single_pass(case, settings.impl)
    return entries


def _as_peft(form: Form) -> bool:
    """Whether a form may follow PEFT's concatenation: SDPA, and no second copy of the keys."""
    return form.sdpa and form.repeats == 1


def _ranked(right: Truth, inputs: Inputs, entries: Mapping[str, Entry], settings: Settings) -> list[str]:
    runs = {name: entry.build(inputs) for name, entry in entries.items()}
    for name, entry in entries.items():
        _check(right, name, entry, runs[name](), settings)
    return measure.ranking(runs, settings.clock, SAMPLE[settings.quick])


def _check(right: Truth, name: str, entry: Entry, result: Any, settings: Settings) -> dict[str, float]:
    return right.errors(f"{name} ({entry.about})", entry.named(result), slack(name, settings))


def _set_count(case: Case, size: float, settings: Settings) -> int:
    rotate = case.rotate if settings.rotate is None else settings.rotate
    return set_count(size, rotate, settings.quick)


def _concatenated_bytes(case: Case, inputs: Inputs) -> int:
    return 2 * case.rows * (case.prefix + case.keys) * case.heads[1] * case.dim * inputs.k.element_size()


def _judge_share(case: Case, dtype: str, share: Share, settings: Settings, quiet: bool) -> Verdict:
    """The share of memory bandwidth has a target for decoding, that of the matrix rate for prefill."""
    kind = "memory" if case.few else "compute"
    if not case.judged or case.backward or share.bound != kind or share.floor < _SHORTEST:
        return Verdict("ceiling", share.share, None, None)
    target = _OF_CEILING[kind]
    limits = settings.ceilings
    quiet = quiet and limits.memory.quiet and limits.matrix[dtype].quiet
    judged = not settings.quick and (quiet or settings.clock == "cpu")
    return Verdict("ceiling", share.share, target, share.share >= target if judged else None)
