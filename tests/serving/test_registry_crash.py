"""Killed or failing writers: the last good version is there, whole, and nothing else."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from residency_tools import constant, files, kill_writers, spec, value_of
from training_cases import processes

from fastprompt import folders
from fastprompt.errors import PromptFileError
from fastprompt.serving.registry import PromptRegistry


class Crash(BaseException):
    """The process dies here: no handler of ours may run after it."""


CHANGES = [
    (folders.os, "rename"),
    (folders.os, "fsync"),
    (folders.shutil, "rmtree"),
    (Path, "mkdir"),
    (folders, "open"),
]


def fail_at(patch, step, error):
    """Let the `step`-th call that changes the file system raise; returns the calls before it."""
    seen = []

    def watch(owner, name):
        real = getattr(owner, name, open)

        def call(*args, **kwargs):
            if len(seen) == step:
                raise error
            seen.append(name)
            return real(*args, **kwargs)

        patch.setattr(owner, name, call, raising=False)

    for owner, name in CHANGES:
        watch(owner, name)
    return seen


def act(registry, kind):
    if kind == "put":
        registry.put("p", files(2))
    else:
        registry.delete("p")


@pytest.mark.parametrize("kind", ["put", "delete"])
@pytest.mark.parametrize("first", [True, False], ids=["replacing", "new"])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_version(tmp_path, monkeypatch, kind, first):
    if kind == "delete" and not first:
        return
    old, new = (1.0 if first else None), (2.0 if kind == "put" else None)
    outcomes = []
    for step in range(100):
        registry = PromptRegistry(tmp_path / str(step), spec())
        registry.put("neighbour", files(7))
        if first:
            registry.put("p", files(1))
        with monkeypatch.context() as patch:
            fail_at(patch, step, Crash())
            try:
                act(registry, kind)
                finished = True
            except Crash:
                finished = False
        before = value_of(registry, "p")  # a process that goes on reading
        again = PromptRegistry(registry.folder, spec())  # one that starts anew
        assert before == value_of(again, "p") and before in (old, new)
        assert again.names() == (["neighbour"] if before is None else ["neighbour", "p"])
        assert sorted(path.name for path in registry.folder.iterdir()) == again.names()  # nothing is left over
        assert value_of(again, "neighbour") == 7
        again.put("p", files(3))
        assert value_of(registry, "p") == 3
        outcomes.append(before == new)
        if finished:
            break
    assert finished and outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1]
    assert len(outcomes) > 3


@pytest.mark.parametrize("kind", ["put", "delete"])
def test_a_disk_that_fails_at_any_step_leaves_one_whole_version(tmp_path, monkeypatch, kind):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for step in range(100):
        registry = PromptRegistry(tmp_path / str(step), spec())
        registry.put("p", files(1))
        with monkeypatch.context() as patch:
            fail_at(patch, step, full)
            try:
                act(registry, kind)
                finished = True
            except PromptFileError as error:
                finished, said = False, str(error)
        assert finished or "No space left" in said
        found = value_of(registry, "p")
        assert found in (1, 2, None) and (kind == "delete" or found is not None)
        assert value_of(PromptRegistry(registry.folder, spec()), "p") == found
        if finished:
            break
    assert finished and step >= 3


def test_a_full_disk_leaves_the_old_version(tmp_path, monkeypatch):
    """Writing runs out of space half-way through the weights."""
    registry = PromptRegistry(tmp_path, spec())
    version = registry.put("p", files(1))

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "open", Full, raising=False)
        for name in ("p", "new"):
            with pytest.raises(PromptFileError, match=r"No space left.*nothing was changed"):
                registry.put(name, files(2))
    assert registry.current("p") == version and registry.names() == ["p"]
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_writers_leave_whole_versions(tmp_path):
    killer = processes().Process(target=kill_writers, args=(tmp_path, 20))
    killer.start()
    killer.join()
    assert killer.exitcode == 0
    registry = PromptRegistry(tmp_path, spec())
    assert "p" in registry
    registry.put("p", files(9))
    assert torch.equal(registry.load(registry.current("p")).weights(), constant(9).weights())
