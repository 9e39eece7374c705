"""Taking the prompts and the backbone out of a live `PeftModel`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprompt.errors import ArgumentError


@contextmanager
def saved_prompts(peft_model: Any) -> Iterator[dict[str, Path]]:
    """Folders with every prompt adapter as PEFT saves it; other adapters (LoRA) stay on the backbone."""
    if not hasattr(peft_model, "peft_config"):
        raise ArgumentError(
            f"peft_model is {type(peft_model).__name__}, expected a PeftModel: give any other to PromptedModel itself, "
            "and load its adapter's folder with load_prompt"
        )
    prompts = [name for name, config in peft_model.peft_config.items() if config.is_prompt_learning]
    if not prompts:
        raise ArgumentError(
            f"the PeftModel has adapters {sorted(peft_model.peft_config)} and none is a prompt: a LoRA backbone goes "
            "into PromptedModel directly, as peft_model.get_base_model()"
        )
    with tempfile.TemporaryDirectory() as root:
        peft_model.save_pretrained(root, selected_adapters=prompts)
        yield {name: Path(root) if name == "default" else Path(root, name) for name in prompts}


def unwrap(peft_model: Any) -> Any:
    """The backbone of a `PeftModel`, with its own task head in place of PEFT's wrapper around it."""
    backbone = peft_model.get_base_model()
    wrappers = [(n, m) for n, m in backbone.named_modules() if hasattr(m, "modules_to_save")]
    for name, wrapper in wrappers:
        backbone.set_submodule(name, wrapper.original_module)
    return backbone
