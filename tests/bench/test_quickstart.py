"""The quickstart is timed in a clone of what is committed, step by step."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import quickstart
from bench.measure import CheckFailed

MAKEFILE = """
.venv/.torch:
\t@mkdir .venv && touch $@
.venv/.installed: .venv/.torch
\t@sleep 0.2 && touch $@
demo: .venv/.installed
\t@test -z "$$OMP_NUM_THREADS$$VIRTUAL_ENV" && echo shown > demo.txt
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with the targets that the steps ask for, and a file that is not committed."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE)
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "Makefile"], ["commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *named, *command], cwd=folder, check=True)
    (folder / "new.txt").write_text("not committed")
    return folder


def test_every_step_is_timed_in_a_clone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VIRTUAL_ENV", "/nowhere")
    taken = quickstart.steps(source, tmp_path / "clone")
    assert list(taken) == ["clone", *quickstart.STEPS] and taken["fastprompt"] >= 0.2 > taken["torch"]
    assert (tmp_path / "clone" / "demo.txt").exists() and not (tmp_path / "clone" / "new.txt").exists()


def test_a_step_that_fails_says_what_it_printed(source: Path, tmp_path: Path) -> None:
    (source / "Makefile").write_text(MAKEFILE.replace("@sleep 0.2", "@echo no compiler; false"))
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-am", "2"], cwd=source, check=True
    )
    with pytest.raises(CheckFailed, match=r"make .venv/.installed ended with status 2: no compiler"):
        quickstart.steps(source, tmp_path / "clone")
