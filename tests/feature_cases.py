"""A model with a prefix and an embedded prompt, and rows of both."""

from __future__ import annotations

from typing import Any

import torch
import zoo

import fastprompt as fp

ROWS: list[str | None] = ["prefix", None, "embed", "prefix"]
GREEDY: dict[str, Any] = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)


def loud(model: fp.PromptedModel) -> fp.PromptedModel:
    """The model with prompt weights large enough that losing one would show."""
    with torch.no_grad():
        for name in model.prompt_names:
            for p in model.library[name].encoder.parameters():
                p.normal_(0.0, 0.5)
    return model.eval()


def prompted(backbone: Any) -> fp.PromptedModel:
    model = fp.PromptedModel(backbone)
    model.add_prompt("prefix", fp.PrefixTuning(num_virtual_tokens=9))
    model.add_prompt("embed", fp.PromptTuning(num_virtual_tokens=4))
    return loud(model)


def padded() -> dict[str, torch.Tensor]:
    """Four rows of 12 random tokens, two of them padded on the left."""
    ids = torch.randint(3, zoo.VOCAB, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[3, :2] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)
