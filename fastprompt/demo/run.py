"""The main job on one backbone: train a prompt by each method, answer with all of them in one batch, check and time."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastprompt.demo.measure import Equality, Row, Timing, compare, exact_match, first_lines, generate, time_ways
from fastprompt.demo.tasks import TRAINING, tasks
from fastprompt.demo.training import Lesson, Listener, Trained, train
from fastprompt.model import PromptedModel
from fastprompt.prompts import PrefixTuning, PromptConfig, PromptTuning, PTuning, PTuningV2

# the task of every prompt and its method; learning rates are `tasks.TRAINING`'s
LESSONS: tuple[tuple[str, PromptConfig], ...] = (
    ("capital", PromptTuning(num_virtual_tokens=16, init="vocab")),
    ("plural", PTuning(num_virtual_tokens=12, encoder_hidden_size=64)),
    ("job", PrefixTuning(num_virtual_tokens=8, reparameterization="mlp", hidden_size=64)),
    ("topic", PTuningV2(num_virtual_tokens=5)),
)
THROUGH_PEFT = "job"
TRAINED, BARE, WRITTEN = "trained", "bare", "hand_written"
VIA_PEFT = f"{THROUGH_PEFT} via PEFT"


@dataclass(frozen=True)
class Settings:
    """How much of everything: `rows` of each task a training step, `timed` rows in a timed batch, `repeats` of it."""

    steps: int = 150
    rows: int = 16
    test: int = 64
    timed: int = 32
    repeats: int = 5
    max_new_tokens: int = 16
    seed: int = 0


QUICK = Settings(steps=5, rows=4, test=4, timed=6, repeats=1, max_new_tokens=6)


@dataclass(frozen=True)
class Line:
    """One prompt: what it is, and the share of held-out inputs answered exactly by it and without it."""

    prompt: str
    via_peft: bool
    task: str
    method: str
    virtual_tokens: int
    trained_parameters: int
    share: float
    tested: int
    bare: float
    hand_written: float
    trained: float


@dataclass(frozen=True)
class Example:
    """One row of the mixed batch."""

    prompt: str | None
    text: str
    answer: str


@dataclass(frozen=True)
class Report:
    """Everything the demo found; `timing` is None unless `equality` is green, `saved` maps prompts to their folders."""

    backbone: str
    backbone_parameters: int
    training: Trained
    lines: tuple[Line, ...]
    examples: tuple[Example, ...]
    batch: int
    equality: Equality
    timing: Timing | None
    saved: dict[str, str]


def run(model: PromptedModel, settings: Settings, out: Path | None, listen: Listener) -> Report:
    """Train, answer, check, time; the prompts are saved in folders under `out` unless it is None.

    Args:
        model: a prompted causal language model with its tokenizer, which pads on the left.
        listen: told of progress as (stage, done, in all, remark).
    """
    known = {task.name: task for task in tasks()}
    lessons = {name: Lesson(known[name], config, TRAINING[config.method].learning_rate) for name, config in LESSONS}
    training = train(model, list(lessons.values()), settings.steps, settings.rows, settings.seed, listen)
    if load_through_peft(model, THROUGH_PEFT, VIA_PEFT):
        lessons[VIA_PEFT] = lessons[THROUGH_PEFT]
    asked = questions(lessons, settings.test)
    rows = [row for group in asked.values() for row in group]
    listen("answer", 0, 1, f"{len(rows)} rows")
    answers = dict(zip(rows, generate(model, rows, settings.max_new_tokens), strict=True))
    listen("answer", 1, 1, f"{len(rows)} rows")
    prompted = {row: answer for row, answer in answers.items() if row.prompt}
    equality = compare(model, list(prompted), list(prompted.values()), settings.max_new_tokens, listen)
    mix = _spread([asked[name, TRAINED] for name in lessons] + [asked[THROUGH_PEFT, BARE]], settings.timed)
    scores = {key: exact_match(model, group, [answers[row] for row in group]) for key, group in asked.items()}
    lines = tuple(_line(model, name, lesson, scores, settings.test) for name, lesson in lessons.items())
    return Report(
        backbone=model.why().partition(":")[0],
        backbone_parameters=model.backbone.num_parameters(),
        training=training,
        lines=lines,
        batch=len(rows),
        examples=_examples(model, mix[: len(lessons) + 1], answers),
        equality=equality,
        timing=time_ways(model, mix, settings.max_new_tokens, settings.repeats, listen) if equality.green else None,
        saved=_save(model, lines, training, out) if out else {},
    )


def load_through_peft(model: PromptedModel, source: str, name: str) -> bool:
    """Load under `name` what PEFT writes after reading the prompt `source`; False where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        return False
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
        ours, theirs = Path(root, "ours"), Path(root, "theirs")
        model.save_prompt(source, ours, format="peft")
        PeftModel.from_pretrained(model.backbone, str(ours)).save_pretrained(str(theirs))
        model.load_prompt(name, theirs)
    return True


def questions(lessons: Mapping[str, Lesson], count: int) -> dict[tuple[str, str], list[Row]]:
    """Held-out inputs, `count` a task: behind its prompts, without any, and asked by hand."""
    asked = {}
    for name, lesson in lessons.items():
        task, pairs = lesson.task, lesson.task.test[:count]
        asked[name, TRAINED] = [Row(name, x, y) for x, y in pairs]
        asked[task.name, BARE] = [Row(None, x, y) for x, y in pairs]
        asked[task.name, WRITTEN] = [Row(None, task.written(x), y) for x, y in pairs]
    return asked


def _spread(groups: Sequence[Sequence[Row]], count: int) -> list[Row]:
    """`count` rows, or as many as there are, taken from the groups in turn."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)][:count]


def _line(model: PromptedModel, name: str, lesson: Lesson, scores: Mapping[tuple[str, str], float], test: int) -> Line:
    size = sum(p.numel() for p in model.library[lesson.name].parameters())
    return Line(
        prompt=name,
        via_peft=name == VIA_PEFT,
        task=lesson.task.description,
        method=lesson.config.method,
        virtual_tokens=lesson.config.num_virtual_tokens,
        trained_parameters=size,
        share=size / model.backbone.num_parameters(),
        tested=len(lesson.task.test[:test]),
        bare=scores[lesson.task.name, BARE],
        hand_written=scores[lesson.task.name, WRITTEN],
        trained=scores[name, TRAINED],
    )


def _examples(model: PromptedModel, rows: Sequence[Row], answers: Mapping[Row, list[int]]) -> tuple[Example, ...]:
    said = first_lines(model, [answers[row] for row in rows])
    return tuple(Example(row.prompt, row.text, answer) for row, answer in zip(rows, said, strict=True))


def _save(model: PromptedModel, lines: Sequence[Line], training: Trained, out: Path) -> dict[str, str]:
    saved = {}
    for line in lines:
        if not line.via_peft:
            model.library[line.prompt].record = {"training": asdict(training), "result": asdict(line)}
            model.save_prompt(line.prompt, out / line.prompt, overwrite=True)
            saved[line.prompt] = str(out / line.prompt)
    return saved
