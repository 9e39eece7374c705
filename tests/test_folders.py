"""Replacing a prompt's folder: old or new, whatever happens, and never anything else of the user's."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch

from fastprompt import folders
from fastprompt.errors import DuplicatePromptError, PromptFileError
from fastprompt.prompts import PromptTuning, SoftPrompt
from fastprompt.spec import BackboneSpec
from fastprompt.store import inspect_prompt, load_prompt, prompt_digest, save_prompt

SPEC = BackboneSpec("llama", 12, 97, (), causal=True)


def everything(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def make(seed: int = 0) -> SoftPrompt:
    return PromptTuning(num_virtual_tokens=3).build(SPEC, seed=seed)


def test_an_existing_prompt_is_replaced_only_when_asked(tmp_path):
    save_prompt(tmp_path / "p", make(0))
    before = everything(tmp_path)
    with pytest.raises(DuplicatePromptError, match="pass overwrite=True"):
        save_prompt(tmp_path / "p", make(1))
    assert everything(tmp_path) == before
    save_prompt(tmp_path / "p", make(1), overwrite=True)
    assert torch.equal(load_prompt(tmp_path / "p")(), make(1)())
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises((PromptFileError, DuplicatePromptError)):
            save_prompt(tmp_path / "p", make(), overwrite=overwrite)
    assert everything(tmp_path) == {"p/thesis.tex": b"years of work"}
    (tmp_path / "q").write_text("a file")
    with pytest.raises(PromptFileError, match="is a file"):
        save_prompt(tmp_path / "q", make(), overwrite=True)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "p").mkdir()
    save_prompt(tmp_path / "p", make())
    assert torch.equal(load_prompt(tmp_path / "p")(), make()())


def test_a_linked_folder_stays_a_link(tmp_path):
    save_prompt(tmp_path / "real", make(0))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_prompt(tmp_path / "link", make(1), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load_prompt(tmp_path / "real")(), make(1)())


class Crash(BaseException):
    """The process dies here: no handler of ours may run after it."""


def crash_at(monkeypatch, step: int) -> list[str]:
    """Kill the `step`-th call that changes the file system; returns the calls seen."""
    seen: list[str] = []

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if any(str(a).startswith("/proc") for a in args):
                return real(*args, **kwargs)
            if len(seen) == step:
                raise Crash(name)
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in [(folders.os, "rename"), (folders.os, "fsync"), (folders.shutil, "rmtree"), (Path, "mkdir")]:
        watch(owner, name)
    return seen


def test_a_crash_at_any_step_leaves_the_old_or_the_new_version(tmp_path, monkeypatch):
    old, new, third = make(0), make(1), make(2)
    outcomes = []
    for step in range(100):
        root = tmp_path / str(step)
        save_prompt(root / "p", old)
        with monkeypatch.context() as patch:
            seen = crash_at(patch, step)
            try:
                save_prompt(root / "p", new, overwrite=True)
                finished = True
            except Crash:
                finished = False
        found = load_prompt(root / "p", SPEC)
        is_new = torch.equal(found(), new())
        assert is_new or torch.equal(found(), old()), f"a mixture after {seen}"
        assert inspect_prompt(root / "p")["sha256"] == hashlib.sha256(files_of(root / "p")).hexdigest()
        outcomes.append(is_new)
        save_prompt(root / "p", third, overwrite=True)  # the next write puts everything right
        assert torch.equal(load_prompt(root / "p")(), third())
        assert [p.name for p in root.iterdir()] == ["p"]
        if finished:
            break
    assert finished and outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1]
    assert len(outcomes) > 8  # mkdir, three syncs, two renames, a sync, a removal


def files_of(path: Path) -> bytes:
    return (folders.current_folder(path) / "prompt.safetensors").read_bytes()


def test_a_crash_in_a_first_save_leaves_nothing_or_the_prompt(tmp_path, monkeypatch):
    for step in range(100):
        root = tmp_path / str(step)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                save_prompt(root / "p", make())
                finished = True
            except Crash:
                finished = False
        if (root / "p").exists():
            assert torch.equal(load_prompt(root / "p")(), make()())
        else:
            with pytest.raises(PromptFileError, match="does not exist"):
                load_prompt(root / "p")
        if finished:
            return
    raise AssertionError("the save never finished")


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_failing_disk_changes_nothing(tmp_path, monkeypatch, failing):
    save_prompt(tmp_path / "p", make(0))
    before = everything(tmp_path)
    real, calls = getattr(os, failing), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, failing, fail)
        with pytest.raises(PromptFileError, match=r"No space left.*nothing was changed"):
            save_prompt(tmp_path / "p", make(1), overwrite=True)
    assert len(calls) >= 2 and everything(tmp_path) == before


def test_readers_and_writers_at_once_see_whole_versions(tmp_path):
    versions = [make(seed) for seed in range(2)]
    digests = {prompt_digest(v) for v in versions}
    save_prompt(tmp_path / "p", versions[0])
    stop, problems = threading.Event(), []

    def write(start: int) -> None:
        for i in range(25):
            save_prompt(tmp_path / "p", versions[(i + start) % 2], overwrite=True)

    def read() -> None:
        while not stop.is_set():
            try:
                if prompt_digest(load_prompt(tmp_path / "p", SPEC)) not in digests:
                    problems.append("a mixture")
            except Exception as error:
                problems.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not problems, problems[:3]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", ".hidden", "x" * 201, "nul\0"])
def test_names_that_leave_their_folder_are_refused(name):
    with pytest.raises(PromptFileError, match="cannot name a prompt folder"):
        folders.check_name(name)
    assert folders.check_name("tenant-7.v2") == "tenant-7.v2"


def test_hidden_targets_are_refused(tmp_path):
    with pytest.raises(PromptFileError, match="cannot name a prompt folder"):
        save_prompt(tmp_path / ".p", make())
    assert not list(tmp_path.iterdir())
