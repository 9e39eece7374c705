"""vLLM on the CPU, in an environment of its own (`make test-vllm`); without it only what needs none runs."""

import importlib.util
import os
from pathlib import Path

import pytest
import vllm_cases
from vllm_cases import NAME, SECRET, Served

from fastprompt import PromptedModel

INSTALLED = getattr(importlib.util.find_spec("vllm"), "origin", None) is not None  # this folder has the name too
ALONE = {
    "test_administration.py",
    "test_store.py",
    "test_tickets.py",
    "test_export.py",
    "test_forgetting.py",
    "test_paths.py",
    "test_writers.py",
}  # what runs without vLLM

if INSTALLED:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture is made."""
    if not INSTALLED and item.path.name not in ALONE:
        pytest.skip("vllm is not installed: make test-vllm")


@pytest.fixture(autouse=True)
def _with_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPROMPT_VLLM_SECRET", SECRET)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A backbone with grouped heads and prompts of every kind and length; tests that change prompts make their own."""
    return vllm_cases.serve(tmp_path_factory.mktemp("gqa"))


@pytest.fixture
def small(tmp_path: Path) -> Served:
    """A backbone of two layers, and no prompts yet."""
    return Served(tmp_path, PromptedModel(vllm_cases.make_backbone(tmp_path / NAME, "gqa", num_hidden_layers=2)))
