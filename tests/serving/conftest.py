"""What several files of tests on serving start from: an empty registry, residencies over it, a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from residency_tools import residencies, spec

from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.residency import Residency


@pytest.fixture
def registry(tmp_path: Path) -> PromptRegistry:
    return PromptRegistry(tmp_path / "prompts", spec())


@pytest.fixture
def make(registry: PromptRegistry) -> Iterator[Callable[..., Residency]]:
    """Makes residencies over the registry, which are closed in the end."""
    with residencies(registry) as build:
        yield build


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    from dashboard_cases import WAIT

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium is installed: apt install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"], timeout=WAIT)
        yield launched
        launched.close()
