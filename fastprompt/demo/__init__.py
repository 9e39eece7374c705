"""The embedded backbone: a small causal LM this project trained itself, with tasks to try prompts on.

Loading needs no network. `python -m fastprompt.demo.pretrain` makes the files in `assets/` again from nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastprompt.demo.tasks import Task, tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["ASSETS", "EMBEDDED", "Task", "backbone", "tasks", "tokenizer"]

EMBEDDED = "embedded"  # what the command line and config files call it
ASSETS = Path(__file__).parent / "assets"


def backbone() -> LlamaForCausalLM:
    """The embedded backbone in float32, in evaluation mode: `LlamaForCausalLM` with grouped-query attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32, local_files_only=True).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Its tokenizer: byte-level BPE, pads on the left, adds no special tokens; the eos token is the end of a line."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS, local_files_only=True)
