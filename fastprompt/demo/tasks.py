"""Downstream tasks for prompts on the embedded backbone: what it knows, to be asked for in one fixed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from fastprompt.demo import corpus

TASK_SEED = 7
ASK = " ="  # an input is a subject and this: a list line without its answer


@dataclass(frozen=True)
class Task:
    """One task: inputs go to the model as they are, a prompt stands before them, the tokenizer's eos ends the answer.

    `train` and `test` hold `(input, target)`, for instance `("gevia =", " nemouth")`, and share no subject.
    `hand_written` is the best of `phrasings` on `train`: a template with the slot `{x}`.
    """

    name: str
    description: str
    hand_written: str
    phrasings: tuple[str, ...]
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]

    def written(self, text: str, template: str | None = None) -> str:
        """The text of an input asked by hand: `hand_written`, or `template`, with the input's subject in its slot."""
        return (template or self.hand_written).format(x=text.removesuffix(ASK))


@dataclass(frozen=True)
class Training:
    """Numbers with which a method learns any of the tasks: AdamW without weight decay, the rate falling to zero."""

    learning_rate: float
    virtual_tokens: int = 10
    steps: int = 120
    batch: int = 16


TRAINING = {
    "prompt_tuning": Training(0.05),
    "p_tuning": Training(0.005),
    "prefix_tuning": Training(0.005),  # through the MLP
    "p_tuning_v2": Training(0.05),  # keys and values themselves
}


# name (also of the skill), description, index of the phrasing that scored best on the training inputs
_TASKS = (
    ("capital", "the capital of a country", 0),
    ("homeland", "the country a person comes from", 0),
    ("job", "what a person works as", 0),
    ("plural", "the plural of a noun", 1),
    ("reverse", "a word backwards, letter by letter", 1),
    ("words", "a number in words", 1),
    ("tone", "whether a review is good or bad", 0),
    ("topic", "what a review is about", 0),
)


def _subjects(skill: corpus.Skill) -> dict[str, str]:
    """What a task asks about; reviews are new ones that the backbone was not trained on."""
    if skill.family != "review":
        return skill.answers
    fresh = corpus.reviews(Random(TASK_SEED), 200, list(corpus.SKILLS["country"].answers))[skill.name]
    return {x: answer for x, answer in fresh.items() if x not in skill.answers}


def _task(name: str, description: str, best: int) -> Task:
    skill = corpus.SKILLS[name]
    pairs = [(x + ASK, f" {answer}") for x, answer in _subjects(skill).items()]
    Random(f"{TASK_SEED}/{name}").shuffle(pairs)
    cut = len(pairs) * 6 // 10
    return Task(name, description, skill.frames[best], skill.frames, tuple(pairs[:cut]), tuple(pairs[cut:]))


def tasks(names: Sequence[str] = ()) -> tuple[Task, ...]:
    """All tasks, or those of `names`; the same on every machine."""
    return tuple(_task(*entry) for entry in _TASKS if not names or entry[0] in names)


def exact_match(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_new_tokens: int = 16) -> float:
    """Share of `(input, target)` whose greedy answer, up to the end of the line, is the target."""
    batch = tokenizer([x for x, _ in pairs], return_tensors="pt", padding=True)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    said = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(s == y for s, (_, y) in zip(said, pairs, strict=True)) / len(pairs)
