"""The extension fastprompt._native_cuda for tensors in main memory: its own bindings, linked with the host machine."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "csrc" / "cuda" / "bindings.cpp", ROOT / "tests" / "cuda" / "interface_on_host.cpp")
_CPU = 1  # DLPack's number of main memory


def build(folder: Path) -> ModuleType:
    """Compiles and loads it."""
    target = folder / f"_native_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    places = [ROOT / "csrc", ROOT / "tests" / "cuda", sysconfig.get_path("include"), pybind11.get_include()]
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        '-DFASTPROMPT_CUDA_ARCHS="90a"',
        "-Wno-unknown-pragmas",
    ]
    flags += [f"-I{place}" for place in places]
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    running = [
        subprocess.Popen(["g++", *flags, "-c", str(source), "-o", str(target)])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert all(process.wait() == 0 for process in running)
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(target)], check=True)
    # under a name of its own: pybind11 gives a module that it has loaded before to whoever asks for that name
    spec = importlib.util.spec_from_file_location("on_the_host_machine._native_cuda", target)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.connect(torch.Tensor.__dlpack_c_exchange_api__, _CPU)
    return extension
