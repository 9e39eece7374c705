"""Builds the native extension; everything else about the package stands in pyproject.toml.

FASTPROMPT_BUILD=none  pure Python (also when unset: there is no native source in csrc/ yet)
FASTPROMPT_BUILD=cpu   with the C++ kernels; an error where they cannot be built
FASTPROMPT_BUILD=cuda  with the C++ and CUDA kernels; an error where they cannot be built
"""

import os

from setuptools import Extension, setup

CHOICES = ("none", "cpu", "cuda")


def extensions() -> list[Extension]:
    """What FASTPROMPT_BUILD asks for; never less than that."""
    choice = os.environ.get("FASTPROMPT_BUILD") or "none"
    if choice not in CHOICES:
        raise SystemExit(f"FASTPROMPT_BUILD is {choice!r}, expected one of {', '.join(CHOICES)}")
    if choice != "none":
        raise SystemExit(
            f"FASTPROMPT_BUILD={choice} asks for native kernels, but this version has no native source; "
            "unset it, or set it to none, to install the pure Python package"
        )
    return []


setup(ext_modules=extensions())
