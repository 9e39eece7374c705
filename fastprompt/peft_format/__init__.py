"""PEFT's adapter folders, read and written as files (`adapter_config.json` and `adapter_model.safetensors`)."""

from fastprompt.peft_format.layout import SUPPORTED
from fastprompt.peft_format.read import is_peft_folder, prompt_from_peft, prompt_from_peft_files, read_peft
from fastprompt.peft_format.write import TASKS, write_peft

__all__ = [
    "SUPPORTED",
    "TASKS",
    "is_peft_folder",
    "prompt_from_peft",
    "prompt_from_peft_files",
    "read_peft",
    "write_peft",
]
