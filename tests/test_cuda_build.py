"""How the CUDA extension is built: for which GPUs, and what is said where it cannot be. No nvcc is needed."""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from fastprompt import costs, native
from fastprompt._cuda import limits

ROOT = Path(__file__).resolve().parents[1]


def test_limits_name_what_a_build_has():
    assert limits.HEAD_DIMS == (64, 96, 128, 256)
    text = (ROOT / "csrc" / "cuda" / "decode.h").read_text()
    assert f"FASTPROMPT_SHARERS = {costs.SHARERS} " in text and "64, 96, 128 or 256" in text


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The functions of setup.py, with an nvcc that knows some GPUs and compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\ncase "$1" in --list-gpu-code) echo "sm_75\nsm_80\nsm_89\nsm_90";; *) exit 3;; esac\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("FASTPROMPT_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("FASTPROMPT_BUILD", "none")
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    found = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setenv("FASTPROMPT_BUILD", "cuda")
    return SimpleNamespace(**found)


def test_gpus_to_build_for(setup, monkeypatch):
    assert setup.cuda_archs() == ["80", "89", "90a"]  # this nvcc knows no 100
    monkeypatch.setenv("FASTPROMPT_CUDA_ARCHS", "90a; 80")
    assert setup.cuda_archs() == ["90a", "80"]
    for bad in ("70", "100", "75", "sm_90", "90b"):
        monkeypatch.setenv("FASTPROMPT_CUDA_ARCHS", bad)
        with pytest.raises(SystemExit, match=f"has '{bad}', expected some of 80, 89, 90 "):
            setup.cuda_archs()


def test_what_is_missing_is_said(setup, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    assert "nvcc cannot build a C++17 extension: it failed without a message" in setup.what_cuda_is_missing()
    with pytest.raises(SystemExit, match=r"FASTPROMPT_BUILD=cuda, but the C(UDA|\+\+) kernels cannot be built: "):
        setup.extensions()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match=r"no CUDA compiler .*/nowhere/bin/nvcc: No such file.*set CUDA_HOME"):
        setup.cuda_archs()


def test_the_build_has_one_extension_more(setup, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    cpu, cuda = setup.extensions()
    assert (cpu.name, cuda.name) == ("fastprompt._native", "fastprompt._native_cuda")
    assert not any("cuda" in source for source in cpu.sources)
    assert {Path(s).suffix for s in cuda.sources} == {".cu", ".cpp"}
    text = setup.cuda_build_file([Path(s) for s in cuda.sources], "_native_cuda.so")
    assert "-gencode=arch=compute_90a,code=sm_90a" in text and "--cudart static" in text
    assert "-gencode=arch=compute_89,code=compute_89" in text and 'ARCHS="80;89+PTX;90a"' in text
    assert text.count("build ") == len(cuda.sources) + 1
    monkeypatch.setenv("LDFLAGS", "-Wl,-rpath,/x")
    assert r"-Xcompiler=-Wl\,-rpath\,/x" in setup.cuda_build_file([Path(s) for s in cuda.sources], "x.so")


@pytest.mark.skipif(importlib.util.find_spec("fastprompt._native_cuda") is None, reason="it is not built")
def test_what_was_built_loads_without_a_gpu():
    """`make test-cuda` builds it before."""
    built = native.load_cuda()
    assert "90a" in built.archs().split(";") and "+PTX" in built.archs()
    x, index = torch.zeros(1, 4, 64).half(), torch.zeros(2).int()
    cache = x.view(1, 1, 4, 64)
    given = (x, None, x, cache, cache, index[None], index, index[:1], x, x, index[:1], index[:1], None, None, None)
    with pytest.raises(RuntimeError, match="a tensor is not in the memory of a GPU"):
        built.Decode(*given, 1.0, 0, 0.0, 0, None, None)
    if not torch.cuda.is_available():
        assert "a GPU and its driver are not installed" in native.cuda_obstacle()
