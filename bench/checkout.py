"""A bare checkout as a place to run from: nothing installed but what fastprompt depends on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "gpu-check"  # where gpu-check compiles what is not installed
_TRITON = "fastprompt._triton"


def find_kernels() -> None:
    """Makes `fastprompt._triton` importable from `kernels/triton`, where only an installation would map it."""
    if _TRITON in sys.modules or importlib.util.find_spec(_TRITON) is not None:
        return
    folder = ROOT / "kernels" / "triton"
    spec = importlib.util.spec_from_file_location(
        _TRITON, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        return
    package = importlib.util.module_from_spec(spec)
    sys.modules[_TRITON] = package
    spec.loader.exec_module(package)


def find_extensions() -> None:
    """Makes native extensions in `BUILT` importable, where none are installed."""
    import fastprompt

    folder = str(BUILT / "fastprompt")
    if folder not in fastprompt.__path__:
        fastprompt.__path__.append(folder)  # what is installed comes first


def find_cases() -> None:
    """Makes the tests' own cases (`op_cases`, `cpu_cases`) importable, as pytest does."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
