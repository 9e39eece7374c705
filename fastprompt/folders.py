"""Folders that are replaced as one: a reader finds the old version or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from fastprompt.errors import DuplicatePromptError, PromptFileError

_LEFTOVER = re.compile(r"\.(.+)\.(new|old|gone)", re.DOTALL)


def replace_folder(
    path: str | os.PathLike[str],
    files: Mapping[str, bytes],
    *,
    overwrite: bool,
    owned: Collection[str] | None = None,
    check: Callable[[], object] = lambda: None,
) -> Path:
    """Write `files` (name -> content) as the folder `path`, replacing a former version in one step.

    Semantics:
        write .NAME.new/ and sync it      # crash: the old version stands
        rename NAME -> .NAME.old          # crash: readers take .NAME.old
        rename .NAME.new -> NAME          # crash: the new version stands
        remove .NAME.old
    Writers of one parent folder take turns (a lock on the parent, where the platform has one). Leftovers of a crash
    are put right by the next write. `check` is called while no other writer may write: what it raises stops the write.
    Errors: DuplicatePromptError if `path` exists and `overwrite` is false;
    PromptFileError if `path` holds anything besides `owned` (default: the names in `files`). Either way nothing
    changed.
    """
    target = Path(os.path.realpath(path))
    check_name(target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            _recover(target)
            check()
            _check_replaceable(target, overwrite, set(owned or files))
            _write(_new(target), files)
            _swap(target)
    except OSError as error:
        raise PromptFileError(f"cannot write {target}: {error}; nothing was changed") from error
    return target


def remove_folder(
    path: str | os.PathLike[str], *, owned: Collection[str], check: Callable[[], object] = lambda: None
) -> None:
    """Remove the folder `path` in one step: a reader finds all of it or nothing, a crash leaves all of it or nothing.

    `check` and the errors are as in `replace_folder`; a folder that is not there is a PromptFileError.
    """
    target = Path(os.path.realpath(path))
    check_name(target.name)
    try:
        with locked(target.parent):
            _recover(target)
            check()
            _check_replaceable(target, True, set(owned))
            os.rename(target, _gone(target))
            _sync(target.parent)
            shutil.rmtree(_gone(target), ignore_errors=True)
    except OSError as error:
        raise PromptFileError(f"cannot remove {target}: {error}; nothing was changed") from error


def recover_folders(parent: str | os.PathLike[str]) -> None:
    """Put right what crashed writers left in the folder `parent`, as their next writes would."""
    with contextlib.suppress(OSError):  # a folder that cannot be written is read as it is
        with os.scandir(parent) as entries:
            left = {match[1] for entry in entries if (match := _LEFTOVER.fullmatch(entry.name))}
        if left:
            with locked(Path(parent)):  # so no writer is at work
                for name in left:
                    _recover(Path(parent, name))


def folder_name(entry: str) -> str | None:
    """The name of the folder that a directory entry stands for: its own, or what a crash left; None for others."""
    if match := _LEFTOVER.fullmatch(entry):
        return match[1] if match[2] == "old" else None
    return None if entry.startswith(".") else entry


def current_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that holds the version of `path` to read: `path`, or what a crash left of it."""
    target = Path(os.path.realpath(path))
    for _ in range(3):  # between two looks a writer may move the folder
        for candidate in (target, _old(target)):
            if candidate.exists():
                return candidate
    return target


def check_name(name: str) -> str:
    """`name`, if it can name a prompt's folder: one path component, not hidden."""
    bad = not name or name.startswith(".") or any(c in name for c in "/\\\0") or len(os.fsencode(name)) > 200
    if bad:
        raise PromptFileError(
            f"{name!r} cannot name a prompt folder: expected one path component that does not start with a dot, "
            "of at most 200 bytes"
        )
    return name


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _gone(target: Path) -> Path:
    return target.with_name(f".{target.name}.gone")


def _recover(target: Path) -> None:
    """Put right what a crashed writer left."""
    old, new = _old(target), _new(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    for rest in (new, _gone(target)):
        if rest.exists():
            shutil.rmtree(rest)


def _check_replaceable(target: Path, overwrite: bool, owned: Collection[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise PromptFileError(f"{target} is a file, expected a folder or a free name: choose another path")
    if not overwrite and any(target.iterdir()):
        raise DuplicatePromptError(
            f"{target} exists already: pass overwrite=True (--overwrite) to replace it, or another path"
        )
    foreign = sorted(p.name for p in target.iterdir() if p.name not in owned)
    if foreign:
        raise PromptFileError(
            f"{target} also holds {foreign[:5]}, which replacing it would delete: choose another path"
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir()
        for name, content in files.items():
            with open(folder / name, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        _sync(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _swap(target: Path) -> None:
    old, new = _old(target), _new(target)
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if replaced:
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if os.name != "posix":  # other platforms cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems sync files only
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder, for one writer at a time; the system drops it when a process dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX platform
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
