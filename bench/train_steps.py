"""Training steps that are compared: fastprompt's, PEFT's, and the bare backbone's with gradients to its embeddings.

A step is forward, backward and AdamW at a learning rate of 0: the optimiser does all its work and changes nothing, so
that every step of a run computes the same loss and the same gradients, and each of them can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

import fastprompt as fp
from bench.backbones import LlamaSize, random_text, twin
from bench.measure import Agreement, Contestant

if TYPE_CHECKING:
    import peft  # a peer, which a machine may lack

LOSS, GRADIENT = 1e-5, 1e-4  # largest relative differences to PEFT: other orders of summation in float32
CONFIGS: dict[str, Callable[[int], fp.PromptConfig]] = {
    "prompt tuning": lambda length: fp.PromptTuning(num_virtual_tokens=length, init="vocab"),
    "p-tuning": lambda length: fp.PTuning(num_virtual_tokens=length, encoder="mlp", encoder_layers=3),
    "prefix tuning": lambda length: fp.PrefixTuning(num_virtual_tokens=length, init_std=0.5),
}
_PEFT = {"prompt tuning": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix tuning": "PREFIX_TUNING"}

Gradients = list[torch.Tensor]
Step = Callable[[], tuple[torch.Tensor, Gradients]]  # the loss, and the gradient of each parameter of each prompt


@dataclass(frozen=True)
class Work:
    """What a step trains on: `rows` of `tokens` tokens for each of the prompts, of `length` virtual tokens."""

    backbone: LlamaSize
    method: str
    prompts: int
    rows: int
    tokens: int
    length: int
    device: str = "cpu"

    def text(self) -> dict[str, Any]:
        """All rows, the rows of one prompt behind those of another; the first token of a row is not predicted.

        PEFT's virtual tokens predict it, and fastprompt's have no logits.
        """
        text = random_text(self.backbone, self.prompts * self.rows, self.tokens, device=self.device)
        labels = text["input_ids"].clone()
        labels[:, 0] = -100
        return text | {"labels": labels, "use_cache": False}

    def batches(self) -> list[dict[str, Any]]:
        """The rows of one prompt after the other."""
        split = {k: v.split(self.rows) for k, v in self.text().items() if isinstance(v, torch.Tensor)}
        return [{k: v[i] for k, v in split.items()} | {"use_cache": False} for i in range(self.prompts)]


def bare(model: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> Step:
    """Forward and backward to the embeddings of each batch in turn, with nothing to optimise."""
    embed = model.get_input_embeddings()

    def step() -> tuple[torch.Tensor, Gradients]:
        total, gradients = torch.zeros(()), []
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "input_ids"}
            embeds = embed(batch["input_ids"]).requires_grad_()
            loss = model(inputs_embeds=embeds, **inputs).loss / len(batches)
            loss.backward()
            total = total + loss.detach()
            gradients.append(embeds.grad)
        return total, gradients if len(batches) == 1 else [torch.cat(gradients)]

    return step


def ours(model: fp.PromptedModel, work: Work) -> Step:
    """One forward and backward for the rows of all prompts, then one optimiser."""
    names = model.prompt_names
    prompts = names[0] if work.prompts == 1 else [name for name in names for _ in range(work.rows)]
    parameters = [p for name in names for p in model.library[name].parameters()]
    optimizer, text = torch.optim.AdamW(parameters, lr=0.0), work.text()

    def step() -> tuple[torch.Tensor, Gradients]:
        optimizer.zero_grad()
        loss = model(**text, prompts=prompts).loss
        (loss * work.prompts).backward()  # each prompt's loss is the mean over its own rows
        optimizer.step()
        return loss.detach(), [p.grad for p in parameters if p.grad is not None]

    return step


def theirs(models: Sequence[peft.PeftModel], work: Work) -> Step:
    """PEFT's models one after the other: forward, backward and the optimiser of each prompt."""
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.AdamW(each, lr=0.0) for each in parameters]
    batches = work.batches()

    def step() -> tuple[torch.Tensor, Gradients]:
        total = torch.zeros(())
        for model, batch, optimizer in zip(models, batches, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            total = total + loss.detach()
        return total / len(models), [p.grad for each in parameters for p in each if p.grad is not None]

    return step


def fastprompt_model(backbone: PreTrainedModel, work: Work) -> fp.PromptedModel:
    """A twin of the backbone with the work's prompts."""
    model = fp.PromptedModel(twin(backbone))
    for i in range(work.prompts):
        model.add_prompt(f"prompt-{i}", CONFIGS[work.method](work.length), seed=i)
    return model


def peft_models(backbone: PreTrainedModel, work: Work, values: fp.PromptedModel) -> list[peft.PeftModel]:
    """A twin of the backbone for each prompt, under PEFT, with the weights that the prompts of `values` have."""
    import peft

    models = []
    for name in values.prompt_names:
        options = {"encoder_hidden_size": work.backbone.hidden} if work.method == "p-tuning" else {}
        config = peft.get_peft_config(
            {"peft_type": _PEFT[work.method], "task_type": "CAUSAL_LM", "num_virtual_tokens": work.length} | options
        )
        model = peft.get_peft_model(twin(backbone), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for theirs, ours in zip(trained, values.library[name].parameters(), strict=True):
                theirs.copy_(ours)  # modules in the same order, weights in the same layout
        models.append(model.eval())
    return models


class Checks:
    """Whether steps of several contestants have the same loss and gradients, in every round."""

    def __init__(self, what: str) -> None:
        self.loss = Agreement(f"loss, {what}", LOSS)
        self.gradient = Agreement(f"gradients, {what}", GRADIENT)
        self._kept: Gradients = []

    def check(self, result: tuple[torch.Tensor, Gradients]) -> None:
        """Raise `CheckFailed` unless the result agrees with the first; a tensor's scale is its own."""
        loss, gradients = result
        self.loss.check(loss)
        if not self._kept:
            self._kept = [g.clone() for g in gradients]
            return
        if len(gradients) != len(self._kept):
            raise ValueError(f"{len(gradients)} gradients, {len(self._kept)} in the first result")
        for gradient, kept in zip(gradients, self._kept, strict=True):
            self.gradient.equal(gradient, kept)

    def contestants(self, steps: Mapping[str, Step]) -> dict[str, Contestant]:
        """The steps to time, each of which ran and was checked once."""
        for step in steps.values():
            self.check(step())
        return {name: Contestant(step, self.check) for name, step in steps.items()}

    def all(self) -> tuple[Agreement, Agreement]:
        return self.loss, self.gradient
