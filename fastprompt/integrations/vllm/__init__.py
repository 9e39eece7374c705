"""Prompts inside vLLM: exported as prefixes, written into its pages, asked for by name over its HTTP interface.

Semantics:
    fastprompt export PROMPTS STORE --format vllm --backbone MODEL     # once, and whenever prompts change
    fastprompt serve --engine vllm --backbone MODEL --prompts PROMPTS  # vLLM's server, `model` names a prompt

Nothing of vLLM is imported before its engine asks for it: exporting runs without it. docs/vllm.md says how it works.
"""

from fastprompt.integrations.vllm.offline import PromptedInputs, transfer_config
from fastprompt.integrations.vllm.store import PrefixStore

__all__ = ["PrefixStore", "PromptedInputs", "transfer_config"]
