"""What is compared end to end: forward, training, generating, many prompts at once.

forward         one prefix for all rows, logits
forward, mixed  as many prefixes as rows; PEFT takes one prompt after the other
train           one prompt for all rows: forward, backward and optimiser, of two methods
together N      16 prompts of two rows of N tokens trained in one batch, PEFT one prompt after the other; beside it the
                bare backbone's own gain from large batches
generate        as many prefixes as rows, greedy
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import fastprompt as fp
from bench import measure
from bench.attention_check import Truth
from bench.backbones import random_text, twin, with_peft
from bench.gpu_check import models, timing
from bench.gpu_check.models import SLACK, Backbones, Named
from bench.gpu_check.records import Emit
from bench.gpu_check.setting import OURS, Setting
from bench.gpu_check.worker import described
from bench.measure import CheckFailed, Spread
from bench.train_steps import Work, bare, fastprompt_model, ours, peft_models, theirs

_METHODS = ("prefix tuning", "prompt tuning")
_STD = 0.5  # of random prefixes: about the size of the backbone's own keys and values


@dataclass(frozen=True)
class Size:
    """Rows, tokens of text, virtual tokens; for `together` prompts and rows of each; rounds of a run."""

    forward: tuple[int, int, int] = (8, 512, 64)
    mixed: tuple[int, int, int] = (16, 128, 64)
    train: tuple[int, int, int] = (8, 512, 64)
    together: tuple[int, int, int] = (16, 2, 64)
    generate: tuple[int, int, int, int] = (16, 32, 64, 16)  # and new tokens
    rounds: int = 7


FULL = Size()
QUICK = Size((2, 9, 4), (3, 7, 4), (2, 9, 4), (3, 2, 4), (3, 5, 4, 3), 2)


@dataclass(frozen=True)
class One:
    """A contestant: what it does, what of its result is checked (None: nothing), in every how many rounds it runs."""

    run: Callable[[], Any]
    named: Callable[[Any], Named] | None = None
    every: int = 1


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One comparison; `CheckFailed` where ours is wrong. PEFT's errors are PEFT's."""
    both = models.backbones(setting.device, setting.quick)
    size = QUICK if setting.quick else FULL
    if unit.startswith("forward"):
        mixed = unit != "forward"
        _forward(size.mixed if mixed else size.forward, mixed, both, setting, size.rounds, emit)
    elif unit == "train":
        rows, tokens, length = size.train
        for method in _METHODS:
            _train(Work(both.size, method, 1, rows, tokens, length, setting.device), both, setting, size.rounds, emit)
    elif unit == "generate":
        _generate(size.generate, both, setting, emit)
    else:
        prompts, rows, length = size.together
        tokens = 5 if setting.quick else int(unit.split()[-1])
        for method in _METHODS:
            work = Work(both.size, method, prompts, rows, tokens, length, setting.device)
            _train(work, both, setting, min(size.rounds, 4), emit)
    timing.release()


def _prompted(model: Any, count: int, length: int) -> fp.PromptedModel:
    prompted = fp.PromptedModel(twin(model))
    for i in range(count):
        prompted.add_prompt(f"prompt-{i}", fp.PrefixTuning(num_virtual_tokens=length, init_std=_STD), seed=i)
    return prompted


def _forward(
    shape: tuple[int, int, int], mixed: bool, both: Backbones, setting: Setting, rounds: int, emit: Emit
) -> None:
    rows, tokens, length = shape
    text = random_text(both.size, rows, tokens, device=setting.device)
    count = rows if mixed else 1
    asked = [f"prompt-{i % count}" for i in range(rows)]

    def logits(model: Any) -> Named:
        with torch.no_grad():
            return {"logits": _prompted(model, count, length)(**text, prompts=asked).logits}

    right = models.truth(logits, both)
    prompted = _prompted(both.model, count, length)
    named: Callable[[Any], Named] = lambda x: {"logits": x}  # noqa: E731
    contestants = {
        OURS: One(lambda: prompted(**text, prompts=asked).logits, named),
        "bare": One(lambda: both.model(**text).logits),
    }
    with torch.no_grad():
        make = partial(_peft, both, prompted)
        _compare(
            "", contestants, "peft", lambda: One(_peft_rows(make(), asked, text), named), right, setting, rounds, emit
        )


def _peft(both: Backbones, prompted: fp.PromptedModel) -> Any:
    """PEFT's model with the same prompts, which it loads from folders."""
    with TemporaryDirectory() as folder:
        adapters = {}
        for name in prompted.prompt_names:
            prompted.save_prompt(name, Path(folder, name), format="peft")
            adapters[name] = Path(folder, name)
        return with_peft(both.model, adapters)


def _peft_rows(peft: Any, asked: Sequence[str], text: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Logits of the rows of one prompt after the other."""
    groups = {name: [i for i, other in enumerate(asked) if other == name] for name in asked}

    def call() -> Tensor:
        made = []
        for name, rows in groups.items():
            peft.set_adapter(name)
            made.append(peft(**{k: v[rows[0] : rows[-1] + 1] for k, v in text.items()}).logits)
        return torch.cat(made)

    return call


def _train(work: Work, both: Backbones, setting: Setting, rounds: int, emit: Emit) -> None:
    def step(model: Any) -> Named:
        return models.numbered(*ours(fastprompt_model(model, work), work)())

    right = models.truth(step, both)
    prompted = fastprompt_model(both.model, work)
    named: Callable[[Any], Named] = lambda found: models.numbered(*found)  # noqa: E731
    contestants = {
        OURS: One(ours(prompted, work), named),
        "bare": One(bare(both.model, [work.text()])),
    }
    if work.prompts > 1:
        contestants["bare, in parts"] = One(bare(both.model, work.batches()))
    peft: Callable[[], One] = lambda: One(theirs(peft_models(both.model, work, prompted), work), named)  # noqa: E731
    _compare(f"{work.method}: ", contestants, "peft", peft, right, setting, rounds, emit)


def _generate(shape: tuple[int, int, int, int], both: Backbones, setting: Setting, emit: Emit) -> None:
    rows, tokens, length, new = shape
    text = random_text(both.size, rows, tokens, device=setting.device)
    prompted = _prompted(both.model, rows, length)
    asked = prompted.prompt_names
    options = models.greedy(new)
    with torch.no_grad():
        made = prompted.generate(**text, prompts=asked, **options)
        _are_greedy(made, tokens, length, asked, both, emit)
        contestants = {
            OURS: One(lambda: prompted.generate(**text, prompts=asked, **options)),
            "bare": One(lambda: both.model.generate(**text, **options)),
        }

        def peft() -> One:
            model = _peft(both, prompted)

            def by_row() -> Tensor:
                found = []
                for row, name in enumerate(asked):
                    model.set_adapter(name)
                    found.append(model.generate(**{k: v[row : row + 1] for k, v in text.items()}, **options))
                return torch.cat(found)

            return One(by_row, every=3)

        _compare("", contestants, "peft", peft, None, setting, 2 if setting.quick else 3, emit)


def _are_greedy(made: Tensor, tokens: int, length: int, asked: Sequence[str], both: Backbones, emit: Emit) -> None:
    """Every token generated is the likeliest by the oracle, as far as its logits can be told apart in bfloat16."""
    mask = torch.ones_like(made)

    def logits(model: Any) -> Named:
        prompted = _prompted(model, len(asked), length)
        return {"logits": prompted(input_ids=made, attention_mask=mask, prompts=asked).logits[:, tokens - 1 : -1]}

    right = models.truth(logits, both)
    exact = right.exact["logits"]
    taken = exact.gather(2, made[:, tokens:, None])[..., 0]
    gap = (exact.max(-1).values - taken).max().item()
    allowed = 2 * right.bound["logits"]
    if not gap <= allowed:
        raise CheckFailed(f"a generated token's logit is {gap:.2e} below the largest, {allowed:.2e} are allowed")
    emit("check", who=OURS, errors={"tokens": gap / allowed})


def _compare(
    what: str,
    contestants: Mapping[str, One],
    peer: str,
    make_peer: Callable[[], One],
    right: Truth | None,
    setting: Setting,
    rounds: int,
    emit: Emit,
) -> None:
    """Checks all, times them in turns, and tells ratios to ours; the peer may fail alone."""
    ready = dict(contestants)
    for name, one in contestants.items():
        _check(what + name, one, right, 1.0 if name == OURS and not setting.quick else SLACK, setting, emit)
    try:
        one = make_peer()
        _check(what + peer, one, right, SLACK, setting, emit)
        ready[peer] = one
    except Exception as error:
        emit("peer", name=what + peer, state="error", detail=described(error))
    samples = _turns(ready, rounds, setting)
    for name, found in samples.items():
        spread = asdict(Spread.of([s.wall for s in found]))
        emit("time", name=what + name, launch="eager", buffers="warm", seconds=spread, calls=1, sets=1)
    pairs = [(name, OURS) for name in samples if name != OURS and name != "bare, in parts"]
    pairs += [("bare, in parts", "bare")] if "bare, in parts" in samples else []
    for over, under in pairs:
        ratio = asdict(measure.ratio(samples, over, under).wall)
        emit("ratio", over=what + over, under=what + under, launch="eager", buffers="warm", ratio=ratio)


def _turns(ready: Mapping[str, One], rounds: int, setting: Setting) -> dict[str, list[measure.Sample]]:
    samples: dict[str, list[measure.Sample]] = {name: [] for name in ready}
    for turn in range(rounds):
        names = [name for name, one in ready.items() if turn % one.every == 0]
        for name in names if turn % 2 == 0 else reversed(names):
            with _impl(name, setting):
                wall = timing.seconds(ready[name].run, setting.device)
            samples[name].append(measure.Sample(turn, wall, wall, 0.0))
    return samples


def _check(what: str, one: One, right: Truth | None, slack: float, setting: Setting, emit: Emit) -> None:
    """Runs it once, which also warms it up."""
    with _impl(what.rpartition(": ")[2], setting):
        found = one.run()
    if one.named is not None and right is not None:
        emit("check", who=what, errors=right.errors(what, one.named(found), slack))


def _impl(name: str, setting: Setting) -> AbstractContextManager[None]:
    return models.implementation(setting.impl if name == OURS else None)
