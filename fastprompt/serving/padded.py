"""Runs a step's rows padded, each of them whole: for backbones that cannot run packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastprompt.batch import PrefixBatch
from fastprompt.call import PreparedCall
from fastprompt.context import Call, activate
from fastprompt.integrations.transformers.backbone import Backbone
from fastprompt.serving.runner import Arenas, Slice, cuts_logits

_TOKENS = 2048  # of a call, padding included, if it has more than one row


class PaddedRunner:
    """Rows padded to the longest, with no cache of their own tokens: every step computes their whole texts again.

    Slower than a packed step by about the length of the text, and right for every backbone that `PromptedModel` takes.
    Rows of about the same length run together, as many as keep the step's memory in bounds.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._cuts = cuts_logits(backbone)

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice], arenas: Arenas) -> Tensor:
        """Logits `[R, V]` of the wanted slices, in their order."""
        rows = [s for s in slices if s.wanted]
        if not rows:
            return torch.empty(0, self.backbone.spec.vocab_size)
        found: dict[int, Tensor] = {}
        for group in _groups([_length(row) for row in rows]):
            found |= zip(group, self._run([rows[i] for i in group], arenas), strict=True)
        return torch.stack([found[i] for i in range(len(rows))])

    def _run(self, rows: Sequence[Slice], arenas: Arenas) -> Tensor:
        lengths = [_length(row) for row in rows]
        longest, device = max(lengths), self.backbone.device
        ids = [[*row.text[:n], *[0] * (longest - n)] for row, n in zip(rows, lengths, strict=True)]
        length = torch.tensor(lengths, device=device)
        mask = (torch.arange(longest, device=device) < length[:, None]).long()
        inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": mask, "use_cache": False}
        last, column = length - 1, length - 1
        if self._cuts:
            inputs["logits_to_keep"], column = last.unique(return_inverse=True)
        call = PreparedCall(inputs, Call(self.backbone.owner), self.backbone.model)
        if any(row.extent for row in rows):
            call.add_prefixes(PrefixBatch.build(*arenas, [row.extent for row in rows]), self.backbone)
        elif self.backbone.takes_position_ids:
            call.count_positions(None)
        with activate(call.call):
            logits: Tensor = self.backbone.model(**call.inputs).logits
        return logits[torch.arange(len(rows), device=device), column]


def _length(row: Slice) -> int:
    return row.first + len(row.tokens)


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows that run together, by number: shortest first, at most `_TOKENS` tokens with padding where more than one."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > _TOKENS:
            yield group
            group = []
        group.append(i)
    yield group
