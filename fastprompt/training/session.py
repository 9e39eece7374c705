"""The model while it trains, and as it was before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastprompt.training.quiet import without_dropout
from fastprompt.training.state import Run


@contextmanager
def training_state(run: Run, options: Mapping[str, Any], backbone_dropout: bool) -> Iterator[None]:
    """Only the run's prompts take gradients in the block; afterwards they are frozen and the rest is as before."""
    model = run.model
    trained = {p for prompt in run.prompts for p in prompt.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and p not in trained]
    cached = getattr(model.backbone.config, "use_cache", None)
    checkpointing = options.get("gradient_checkpointing") or options.get("activation_checkpointing")
    how = dict(options.get("gradient_checkpointing_kwargs") or options.get("activation_checkpointing_kwargs") or {})
    which = {name: how.pop(name) for name in ("every_n_layers", "offload") if name in how}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # wherever the caller stands
        # the Trainer refuses quantised models on which nothing else trains: here prompts do
        vars(model)["_hf_peft_config_loaded"] = True
        stack.callback(vars(model).pop, "_hf_peft_config_loaded")
        if not backbone_dropout:
            stack.enter_context(without_dropout(model.backbone))
        if checkpointing:
            model.activation_checkpointing_enable(how, **which)
            stack.callback(model.activation_checkpointing_disable)
        try:
            for parameter in (*others, *trained):
                parameter.requires_grad_(parameter in trained)
            yield
        finally:
            for parameter in (*others, *trained):
                parameter.requires_grad_(parameter not in trained)
            if cached is not None:
                model.backbone.config.use_cache = cached
            for name in ("forward", "_original_forward"):  # accelerate's wrapper for mixed precision
                vars(model).pop(name, None)
            model.zero_grad(set_to_none=True)
            model.eval()
