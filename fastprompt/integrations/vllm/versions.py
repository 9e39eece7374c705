"""The versions of vLLM that this integration was tested with."""

from __future__ import annotations

import re

from fastprompt.errors import UnsupportedError

OLDEST, NEWEST = (0, 28), (0, 32)  # both tested, as is what lies between


def check_version(version: str) -> None:
    """Raise UnsupportedError unless a version of vLLM is one of those tested; its interfaces change every release."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        low, high = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise UnsupportedError(
            f"vllm is version {version}, expected {low} to {high}, whose connector interface this fastprompt knows: "
            f"pip install 'vllm>={low},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )


def check_installed() -> None:
    """Raise UnsupportedError unless the vLLM that is installed can be used."""
    try:
        import vllm
    except ImportError as error:
        raise UnsupportedError(f"vllm cannot be imported ({error}): see docs/vllm.md for how to install it") from error
    check_version(vllm.__version__)
