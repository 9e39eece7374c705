"""The task head that belongs to a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from fastprompt.errors import ArgumentError

_PARAMETER_NAME = re.compile(r"\w+(\.\w+)*")


class PromptHead(nn.Module):
    """The task head trained with a prompt: parameters that stand in for those of one backbone module.

    `module` is the backbone module's name ("classifier", "score", "qa_outputs"), or "" when the head spans several
    modules and the names start at the backbone itself. `tensors()` gives name inside the module -> parameter.
    """

    def __init__(self, module: str, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.module = module
        if module and not _PARAMETER_NAME.fullmatch(module):
            raise ArgumentError(f'head module is {module!r}, expected a dotted module name such as "classifier"')
        if not tensors:
            raise ArgumentError(f"head {module!r} has no parameters: pass None for a prompt without a head")
        for name in sorted(tensors):
            if not _PARAMETER_NAME.fullmatch(name):
                raise ArgumentError(f'head parameter is named {name!r}, expected a dotted name such as "dense.weight"')
            if not tensors[name].numel():
                raise ArgumentError(f"head parameter {name!r} is {list(tensors[name].shape)}, expected numbers")
            with torch.inference_mode(False):
                value = tensors[name].detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
                self.register_parameter(name.replace(".", "/"), nn.Parameter(value))

    @property
    def outputs(self) -> int:
        """How many numbers it answers with: the rows of its last layer, which is not a `pre_classifier`."""
        tensors = self.tensors()
        last = [t for name, t in tensors.items() if not name.startswith("pre_")] or list(tensors.values())
        return last[-1].shape[0] if last[-1].dim() else 1

    def tensors(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): p for name, p in self.named_parameters()}
