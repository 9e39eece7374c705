"""A different task head for each row of a batch, over one frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastprompt import ops
from fastprompt.context import Call, Owner, activate, active
from fastprompt.errors import ArgumentError
from fastprompt.prompts import PromptHead
from fastprompt.prompts.base import check_int

HEAD_MODULES = ("classifier", "score", "qa_outputs", "classification_head")


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the backbone's task head (DistilBERT's has two), none without one."""
    return [name for name, _ in model.named_children() if name.endswith(HEAD_MODULES)]


def check_labels(num_labels: int | None, labels: Sequence[str] | None) -> None:
    """Raise unless these describe a head's outputs, or leave them as the backbone's."""
    if num_labels is not None:
        check_int("num_labels", num_labels, 1)
    if labels is not None and (isinstance(labels, str) or not labels or not all(isinstance(n, str) for n in labels)):
        raise ArgumentError(f"labels is {labels!r}, expected a list of at least one name")
    if num_labels is not None and labels is not None and num_labels != len(labels):
        raise ArgumentError(f"num_labels is {num_labels}, but labels names {len(labels)}: give one of them")


def fresh_head(model: Any, num_labels: int | None) -> PromptHead | None:
    """A trainable copy of the backbone's head, its last layer drawn anew when it gets another number of labels."""
    names = head_modules(model)
    if not names:
        if num_labels is not None:
            raise ArgumentError(
                f"num_labels is {num_labels}, but {type(model).__name__} has no task head ({', '.join(HEAD_MODULES)}): "
                "load the backbone with AutoModelForSequenceClassification or AutoModelForTokenClassification"
            )
        return None
    tensors = {
        f"{name}.{key}": value.detach().float().clone()
        for name in names
        for key, value in model.get_submodule(name).state_dict().items()
        if value.is_floating_point()
    }
    if num_labels is not None:
        last = list(tensors)[-1].rpartition(".")[0]
        std = getattr(model.config, "initializer_range", 0.02)
        for key in [k for k in tensors if k.startswith(f"{last}.")]:
            shape = (num_labels, *tensors[key].shape[1:])
            tensors[key] = torch.randn(shape) * std if len(shape) > 1 else torch.zeros(shape)
    if len(names) > 1:
        return PromptHead("", tensors)
    return PromptHead(names[0], {key.removeprefix(f"{names[0]}."): value for key, value in tensors.items()})


def _split(head: PromptHead | None, module: str) -> Mapping[str, torch.Tensor] | None:
    """The head's parameters for one backbone module, None if it has none there."""
    if head is None:
        return None
    start = "" if head.module == module else f"{module}."
    own = {k.removeprefix(start): v for k, v in head.tensors().items() if k.startswith(start)}
    return own if (head.module == module or not head.module) and own else None


@dataclass(frozen=True)
class RowHeads:
    """The heads of a batch: `heads[i]` serves the rows where `index[b] == i`; None is the backbone's own."""

    heads: tuple[PromptHead | None, ...]
    index: tuple[int, ...]

    @staticmethod
    def build(rows: Sequence[PromptHead | None]) -> RowHeads | None:
        """None when no row has a head of its own."""
        if all(head is None for head in rows):
            return None
        unique: list[PromptHead | None] = list({id(h): h for h in rows}.values())
        places = {id(h): i for i, h in enumerate(unique)}
        return RowHeads(tuple(unique), tuple(places[id(h)] for h in rows))

    def modules(self) -> set[str]:
        """Backbone modules these heads stand in for."""
        names = set()
        for head in filter(None, self.heads):
            names |= {head.module} if head.module else {k.split(".")[0] for k in head.tensors()}
        return names

    def labels(self) -> set[int]:
        """Numbers of outputs of these heads."""
        return {head.outputs for head in self.heads if head is not None}

    def apply(self, name: str, module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Output of every row's own head; columns beyond a head's labels are -inf."""
        parts = [_split(head, name) for head in self.heads]
        if all(part is None for part in parts):
            return output
        if isinstance(module, nn.Linear):
            return self._linear(module, parts, inputs)
        groups = [[b for b, i in enumerate(self.index) if i == g] for g in range(len(self.heads))]
        pieces = [
            output[rows] if part is None else torch.func.functional_call(module, _cast(part, inputs), (inputs[rows],))
            for part, rows in zip(parts, groups, strict=True)
        ]
        width = max(piece.shape[-1] for piece in pieces)
        padded = [nn.functional.pad(p, (0, width - p.shape[-1]), value=float("-inf")) for p in pieces]
        order = torch.tensor([b for rows in groups for b in rows], device=output.device)
        return torch.cat(padded)[order.argsort()]

    def _linear(
        self, module: nn.Linear, parts: Sequence[Mapping[str, torch.Tensor] | None], inputs: torch.Tensor
    ) -> torch.Tensor:
        own = {"weight": module.weight} | ({"bias": module.bias} if module.bias is not None else {})
        stacked = [_cast(part or own, inputs) for part in parts]
        sizes = [s["weight"].shape[0] for s in stacked]
        weight = torch.cat([s["weight"] for s in stacked])
        biases = [s["bias"] if "bias" in s else s["weight"].new_zeros(n) for s, n in zip(stacked, sizes, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        start, length = (
            torch.tensor([values[i] for i in self.index], dtype=torch.int32, device=inputs.device)
            for values in (starts, sizes)
        )
        return ops.grouped_linear(inputs, weight, torch.cat(biases), start, length, max_out=max(sizes))


def _cast(tensors: Mapping[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: t.to(like.device, like.dtype) for name, t in tensors.items()}


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over padded logits `[B, (N,) C]`; labels int64 `[B, (N)]`, -100 ignored."""
    if labels.is_floating_point():
        raise ArgumentError(
            "labels are floating point (regression or multi-label), and the rows' heads have other sizes than the "
            "backbone's num_labels: give them the same number of labels"
        )
    known = labels.masked_fill(labels == -100, 0)
    allowed = (known >= 0) & (known < logits.shape[-1])
    foreign = logits.detach().gather(-1, known.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0].isneginf()
    if bool((~allowed | foreign).any()):
        raise ArgumentError("labels has a class that the head of its row does not have: check the row's prompt")
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100)


def hook(name: str, module: nn.Module, owner: Owner) -> None:
    """Let the backbone's head `module` answer with each row's own head while a call carries heads."""
    module.register_forward_hook(partial(_answer, owner, name))


def _answer(
    owner: Owner, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor | None:
    call = active(owner)
    if call is None or call.heads is None:
        return None
    with activate(Call(owner)):  # a head may run its own module again
        return call.heads.apply(name, module, args[0], output)
