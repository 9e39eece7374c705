"""Several prompts trained in one run: rows of all of them share every forward and backward over the backbone."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fastprompt.demo.tasks import Task
from fastprompt.model import PromptedModel
from fastprompt.prompts import PromptConfig

Listener = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, a remark


@dataclass(frozen=True)
class Lesson:
    """A prompt to train, named as its task; Adam, the learning rate falling to zero linearly."""

    task: Task
    config: PromptConfig
    learning_rate: float

    @property
    def name(self) -> str:
        return self.task.name


@dataclass(frozen=True)
class Trained:
    """What a training run did; `loss` is the one logged last, a mean over prompts."""

    steps: int
    rows_per_step: int
    seconds: float
    loss: float
    backbone_unchanged: bool


class Mixture(IterableDataset):
    """Endless rows `(prompt, input, target)`: the lessons take turns, each going through its pairs in random order."""

    def __init__(self, lessons: Sequence[Lesson], seed: int) -> None:
        self.lessons, self.seed = lessons, seed

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        decks = [self._deck(lesson) for lesson in self.lessons]
        while True:
            for deck in decks:
                yield next(deck)

    def _deck(self, lesson: Lesson) -> Iterator[tuple[str, str, str]]:
        rng = Random(f"{self.seed}/{lesson.name}")
        while True:
            for text, target in rng.sample(lesson.task.train, len(lesson.task.train)):
                yield lesson.name, text, target


class Collator:
    """Rows to arguments of `PromptedModel.forward`: only the target and the eos token after it are labelled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        ids, labels = [], []
        for _, text, target in rows:
            given = self.tokenizer(text).input_ids
            wanted = [*self.tokenizer(target, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            ids.append(torch.tensor(given + wanted))
            labels.append(torch.tensor([-100] * len(given) + wanted))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
            "prompts": [name for name, _, _ in rows],
        }


class MixedTrainer(Trainer):
    """Gives every prompt the gradient it would have alone."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = summed_loss(output.logits, labels, inputs["prompts"])
        return (loss, output) if return_outputs else loss


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Sum over prompts of the mean cross-entropy of their rows' labelled tokens.

    Logits `[B, N, C]`; labels `[B, N]`, -100 where there is none, each predicted at the token before it.
    """
    names, wanted = list(dict.fromkeys(prompts)), labels[:, 1:]
    owner = torch.tensor([names.index(name) for name in prompts], device=labels.device)[:, None].expand_as(wanted)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), wanted, reduction="none")
    counts = torch.bincount(owner[wanted != -100], minlength=len(names))
    return (losses / counts[owner]).sum()


class Reporter(TrainerCallback):
    """Tells a listener about every step and the loss logged last, a mean over prompts."""

    def __init__(self, listen: Listener, prompts: int) -> None:
        self.listen, self.prompts, self.loss = listen, prompts, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = logs["loss"] / self.prompts if logs and "loss" in logs else self.loss

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.listen("train", state.global_step, state.max_steps, f"loss {self.loss:.3f}")


def train(
    model: PromptedModel, lessons: Sequence[Lesson], steps: int, rows: int, seed: int, listen: Listener
) -> Trained:
    """Add a prompt for each lesson to `model` and train all of them together.

    Semantics: every step takes `rows` rows of each lesson as one batch, one forward and one backward; each prompt has
    its own parameters, learning rate and term of the loss, so it learns what it would learn alone. Nothing else is
    trained.
    """
    before = _digest(model.backbone)
    for lesson in lessons:
        model.add_prompt(lesson.name, lesson.config, seed=seed)
    reporter = Reporter(listen, len(lessons))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=rows * len(lessons),
            max_grad_norm=0.0,  # clipping by a common norm would couple the prompts
            remove_unused_columns=False,
            logging_steps=max(1, min(10, steps // 5)),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        model.to(arguments.device)
        trainer = MixedTrainer(
            model,
            arguments,
            data_collator=Collator(model.tokenizer),
            train_dataset=Mixture(lessons, seed),
            optimizers=optimizer(model, lessons, steps),
            callbacks=[reporter],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    model.eval()
    for lesson in lessons:
        model.library[lesson.name].requires_grad_(False)
    return Trained(steps, rows * len(lessons), seconds, reporter.loss, _digest(model.backbone) == before)


def optimizer(
    model: PromptedModel, lessons: Sequence[Lesson], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam with a group for each prompt, and its schedule."""
    groups = [
        {"params": [p for p in model.library[lesson.name].parameters() if p.requires_grad], "lr": lesson.learning_rate}
        for lesson in lessons
    ]
    adam = torch.optim.Adam(groups)
    return adam, torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
