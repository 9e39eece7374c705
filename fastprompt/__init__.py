"""Soft prompts over one frozen transformer: any mixture of them in a batch, each stored once and read in place."""

from fastprompt.errors import FastPromptError
from fastprompt.model import PromptedModel
from fastprompt.prompts import (
    Cartridge,
    PrefixTuning,
    PromptConfig,
    PromptTuning,
    PTuning,
    PTuningV2,
    SoftPrompt,
)

__version__ = "0.1.0"

__all__ = [
    "Cartridge",
    "FastPromptError",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptConfig",
    "PromptTuning",
    "PromptedModel",
    "SoftPrompt",
    "__version__",
]
