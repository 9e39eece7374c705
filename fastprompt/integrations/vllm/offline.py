"""Prompts for vLLM's Python interface: how to start it, and what to hand it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fastprompt import env
from fastprompt.errors import ArgumentError
from fastprompt.integrations.vllm.store import PrefixStore
from fastprompt.integrations.vllm.tickets import Seal, code_ids, placeholders


def transfer_config(store: str | os.PathLike[str], **more: Any) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for a store of exported prompts; `more` goes to the connector and the HTTP plugin."""
    return {
        "kv_connector": "FastPromptConnector",
        "kv_connector_module_path": "fastprompt.integrations.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",  # a request whose prefix cannot be loaded must not go on without it
        "kv_connector_extra_config": {"store": os.path.abspath(store), **more},
    }


def special_ids(config: Any) -> set[int]:
    """Token ids with a meaning of their own, of a transformers config."""
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return found


class PromptedInputs:
    """Inputs for `vllm.LLM.generate` under prompts by name.

    Semantics:
        llm = LLM(model, kv_transfer_config=transfer_config(store), ...)
        inputs = PromptedInputs.of(llm)
        llm.generate([inputs("a", ids), inputs(None, ids)], SamplingParams(...))
    The virtual tokens come first in `prompt_token_ids` of what vLLM answers. `secret` is FASTPROMPT_VLLM_SECRET's,
    which the engine reads. A request for `prompt_logprobs` under a prompt fails.
    """

    def __init__(self, store: PrefixStore, vocab_size: int, special: set[int], secret: str | None = None) -> None:
        self.store = store
        self._ids = code_ids(vocab_size, special)
        self._seal = Seal(secret or env.vllm_secret() or "")

    @classmethod
    def of(cls, llm: Any, secret: str | None = None) -> PromptedInputs:
        """Those of a `vllm.LLM` that was started with `transfer_config`."""
        config = llm.llm_engine.vllm_config
        store = PrefixStore(config.kv_transfer_config.kv_connector_extra_config["store"])
        model = config.model_config
        return cls(store, model.get_vocab_size(), special_ids(model.hf_text_config), secret)

    def __call__(self, name: str | None, token_ids: Sequence[int]) -> dict[str, Any]:
        """What to generate from; `name` None is the bare backbone. Errors: PromptNotFoundError, ArgumentError."""
        if not token_ids:
            raise ArgumentError("token_ids is empty, expected one token at least behind a prompt")
        if name is None:
            return {"prompt_token_ids": list(token_ids)}
        ticket = self.store.current(name).ticket
        ids = [*placeholders(ticket, self._ids), *token_ids]
        return {"prompt_token_ids": ids, "cache_salt": self._seal.salt(ticket)}
