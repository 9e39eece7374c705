"""vLLM's own server, started with what prompts need."""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastprompt import env
from fastprompt.errors import ArgumentError
from fastprompt.integrations.vllm.offline import transfer_config

PLUGIN = "fastprompt"
MODULE = "fastprompt.integrations.vllm.command"
OURS = ("--kv-transfer-config", "--model", "--served-model-name", "--api-key", "--enable-lora")


@dataclass(frozen=True)
class VllmServer:
    """How vLLM's server is to run; None leaves a setting to vLLM. `more` are options of its own."""

    model: str
    name: str
    store: Path
    prompts: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str | None = None
    keys: Path | None = None
    insecure: bool = False
    open_metrics: bool = False
    max_rows: int | None = None
    max_batch_tokens: int | None = None
    max_model_len: int | None = None
    kv_bytes: int | None = None
    more: Sequence[str] = ()

    def command(self) -> list[str]:
        """The command line. Errors: ArgumentError for options in `more` that would undo others."""
        taken = [option.partition("=")[0] for option in self.more if _is_ours(option)]
        if taken:
            raise ArgumentError(f"{', '.join(taken)} cannot be given to vLLM: fastprompt serve sets or refuses it")
        settings: dict[str, Any] = {"insecure": self.insecure, "open_metrics": self.open_metrics}
        settings |= {n: str(p.absolute()) for n, p in (("prompts", self.prompts), ("keys", self.keys)) if p is not None}
        options: dict[str, Any] = {
            "served-model-name": self.name,
            "host": self.host,
            "port": self.port,
            "dtype": self.dtype,
            "max-num-seqs": self.max_rows,
            "max-num-batched-tokens": self.max_batch_tokens,
            "max-model-len": self.max_model_len,
            "kv-cache-memory-bytes": self.kv_bytes,
            "kv-transfer-config": json.dumps(transfer_config(self.store, **settings)),
        }
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return [sys.executable, "-m", MODULE, self.model, *given, *self.more]

    def environment(self, held: Mapping[str, str]) -> dict[str, str]:
        """The environment: `held`, the plugin allowed, and a secret unless there is one."""
        allowed = [name for name in held.get("VLLM_PLUGINS", "").split(",") if name]
        return {
            **held,
            "VLLM_WORKER_MULTIPROC_METHOD": held.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
            "VLLM_USE_RUST_FRONTEND": "0",  # it knows no plugins, and so no keys
            "VLLM_PLUGINS": ",".join(dict.fromkeys([*allowed, PLUGIN])),
            "FASTPROMPT_VLLM_SECRET": env.vllm_secret() or secrets.token_hex(32),
        }

    def run(self) -> NoReturn:
        """Become that server: this process ends with it, and signals reach it."""
        command = self.command()
        os.execve(command[0], command, self.environment(env.inherited()))


def _is_ours(option: str) -> bool:
    """Whether it is an option of `OURS` as vLLM reads it: also shortened, with underscores, or for a part of JSON."""
    name = re.split(r"[=.]", option)[0].replace("_", "-")
    return len(name) > 2 and any(known.startswith(name) for known in OURS)
