"""Every environment variable fastprompt reads, read here and nowhere else (table in docs/environment.md)."""

import os
from typing import Any

# os.environ encodes and decodes at every look-up, which takes a microsecond; behind it is a dict, of bytes on POSIX
_held: Any = getattr(os.environ, "_data", os.environ)
_IMPL: Any = b"FASTPROMPT_IMPL" if os.supports_bytes_environ and _held is not os.environ else "FASTPROMPT_IMPL"


def default_impl() -> str | None:
    """`FASTPROMPT_IMPL`: implementation the ops use when a call names none. Looked up at every call of an op."""
    value = _held.get(_IMPL)
    return os.fsdecode(value) if value else None


def cpu_isa() -> str | None:
    """`FASTPROMPT_CPU_ISA`: instruction set of the native kernels, the best one by default."""
    return os.environ.get("FASTPROMPT_CPU_ISA") or None


def costs() -> str | None:
    """`FASTPROMPT_COSTS`: file with cost tables of decoding, instead of the package's own."""
    return os.environ.get("FASTPROMPT_COSTS") or None


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET`, Triton's own: its kernels run in Python, on tensors in the CPU's memory."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def data_folder() -> str | None:
    """`FASTPROMPT_DATA`: folder of the public data sets that quality is measured on."""
    return os.environ.get("FASTPROMPT_DATA") or None


def api_keys() -> list[str]:
    """`FASTPROMPT_API_KEYS`: keys that may use every prompt of a server."""
    return _listed("FASTPROMPT_API_KEYS")


def admin_keys() -> list[str]:
    """`FASTPROMPT_ADMIN_KEYS`: keys that may administer a server too."""
    return _listed("FASTPROMPT_ADMIN_KEYS")


def vllm_secret() -> str | None:
    """`FASTPROMPT_VLLM_SECRET`: what the processes of one vLLM server seal requests with."""
    return os.environ.get("FASTPROMPT_VLLM_SECRET") or None


def inherited() -> dict[str, str]:
    """All variables of this process, for one that it becomes or starts."""
    return dict(os.environ)


def _listed(name: str) -> list[str]:
    return os.environ.get(name, "").replace(",", " ").split()


def in_force() -> dict[str, str]:
    """The variables of this package that are set, by name; keys and secrets are not shown."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTPROMPT_")}
    return {name: "***" if name.endswith(("_KEYS", "_SECRET")) else value for name, value in found.items()}
