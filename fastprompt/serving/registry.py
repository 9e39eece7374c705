"""The prompts that may be served: folders on disk, found by name, read when asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fastprompt.errors import ConflictError, PromptChangedError, PromptFileError, PromptNotFoundError
from fastprompt.folders import current_folder, recover_folders, remove_folder, replace_folder
from fastprompt.prompt_format import METADATA, WEIGHTS, parse_metadata, parse_prompt, sha256
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.archives import unpack
from fastprompt.serving.listing import Listing, check_prompt_name
from fastprompt.serving.uploads import MAX_BYTES, parse_upload
from fastprompt.serving.versions import PromptVersion, Versions, describe
from fastprompt.spec import BackboneSpec

__all__ = ["ConflictError", "PromptChangedError", "PromptRegistry", "PromptVersion"]


class PromptRegistry:
    """Prompts in the sub-folders of one folder, for one backbone.

    Semantics:
        names(after, limit)   sorted, from memory: as of the last `refresh`, and what this object has seen since
        current(name)         never stale: looks at one file's time, and at the file where that changed
        put, put_archive      checked whole before anything is written, then replaced in one step
        load(version)         exactly that version, or PromptChangedError
    Opening lists the folder once, whatever the sub-folders hold: a damaged prompt fails alone, when it is asked for.
    Several processes may write to one folder. All methods may be called from any thread.
    """

    def __init__(self, folder: str | os.PathLike[str], spec: BackboneSpec, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder = Path(folder).resolve()
        self.spec = spec
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PromptFileError(f"folder {self.folder} cannot be made ({error})") from error
        recover_folders(self.folder)
        self._versions = Versions(self.folder)
        self._listing = Listing(self.folder)
        self._listing.refresh()

    def __len__(self) -> int:
        return len(self._listing)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._listing

    @property
    def generation(self) -> int:
        """A number that grows whenever this object sees that a prompt came, went or was replaced."""
        return self._listing.generation + self._versions.changes

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Sorted names, those behind `after` only and at most `limit` of them."""
        return self._listing.page(after, limit)

    def refresh(self, rest: float = 0.0) -> bool:
        """See what other processes added and removed: lists the folder if its time has changed. Whether names did.

        With many names that takes a while; asleep for `rest` seconds now and then, it leaves other threads their time.
        """
        return self._listing.refresh(rest)

    def current(self, name: str) -> PromptVersion:
        """What `name` stands for now.

        Errors: PromptNotFoundError; PromptFileError where its files are damaged, which concerns no other prompt.
        """
        try:
            version = self._versions.current(name)
        except PromptNotFoundError:
            if name in self:
                self._listing.remove(name)
            raise
        self._listing.add(name)
        return version

    def created(self, name: str) -> float:
        """When a prompt was stored, in seconds since 1970: one look at a file's time, which is not read.

        Errors: those of `current`, for a prompt whose file is not there.
        """
        try:
            return os.stat(self.folder / check_prompt_name(name) / METADATA).st_mtime
        except OSError:  # being replaced, or damaged
            return self.current(name).created

    def put(
        self, name: str, files: Mapping[str, bytes], *, if_match: str | None = None, if_none_match: bool = False
    ) -> PromptVersion:
        """Store a prompt under a name: the files of fastprompt's own format or of a PEFT adapter, name -> content.

        Semantics: with `if_match` only if the name stands for that version ("*": for any), with `if_none_match` only if
        it stands for none.
        Errors: PromptFileError, IncompatiblePromptError or UnsupportedError for files that are not a prompt of this
        backbone; ConflictError for a condition that does not hold; PromptFileError where the disk fails. Nothing is
        changed then.
        """
        folder = self._own_folder(check_prompt_name(name))
        stored = parse_upload(files, self.spec, self.max_bytes)
        version = describe(folder, stored[METADATA], len(stored[WEIGHTS]), time.time())
        replace_folder(folder, stored, overwrite=True, check=self._condition(name, if_match, if_none_match))
        self._versions.forget(name)
        self._listing.add(name)
        with suppress(OSError):  # replaced or removed by somebody else already
            version = replace(version, created=os.stat(folder / METADATA).st_mtime)
        return version

    def put_archive(
        self, name: str, data: bytes, *, if_match: str | None = None, if_none_match: bool = False
    ) -> PromptVersion:
        """As `put`, from a .zip, .tar or .tar.gz of these files."""
        return self.put(name, unpack(data, self.max_bytes), if_match=if_match, if_none_match=if_none_match)

    def delete(self, name: str, *, if_match: str | None = None) -> PromptVersion | None:
        """Remove a prompt; what it was, None for a damaged one. Errors: PromptNotFoundError, ConflictError."""
        version = self._intact(name)
        folder = self._own_folder(name)
        remove_folder(folder, owned=(METADATA, WEIGHTS), check=self._condition(name, if_match or "*", False))
        self._versions.forget(name)
        self._listing.remove(name)
        return version

    def load(self, version: PromptVersion) -> SoftPrompt:
        """Read a version: trainable, float32, on the CPU; its digests, shapes and numbers checked.

        Errors: PromptChangedError if the name stands for another version by now, or for none; PromptFileError for
        damaged files; IncompatiblePromptError for a prompt of another backbone.
        """
        where = os.fspath(version.folder)
        for _ in range(2):  # the folder may be replaced between its two files
            folder = current_folder(version.folder)
            try:
                raw, weights = ((folder / file).read_bytes() for file in (METADATA, WEIGHTS))
            except OSError:
                continue
            if sha256(raw) == version.version:
                metadata = parse_metadata(raw, f"{where}/{METADATA}")
                if sha256(weights) == metadata["sha256"]:
                    return parse_prompt(metadata, weights, self.spec, where=where)
        if not self._stands_for(version.name, version.version):
            raise PromptChangedError(f"prompt {version.name!r} has changed since it was looked up: look it up again")
        raise PromptFileError(
            f"{where}/{WEIGHTS} is missing or does not match the digest in {METADATA}: it is truncated or altered; "
            "store the prompt again"
        )

    def _own_folder(self, name: str) -> Path:
        """Where to write a prompt: never through a link, behind which may be another prompt, or anything at all."""
        folder = self.folder / name
        if folder.is_symlink():
            raise PromptFileError(f"{folder} is a link, which is read but not written: remove the link, or its target")
        return folder

    def _intact(self, name: str) -> PromptVersion | None:
        """The current version, None for a damaged one. Errors: PromptNotFoundError."""
        try:
            return self._versions.current(name)
        except PromptFileError:
            return None

    def _stands_for(self, name: str, version: str) -> bool:
        """Whether a name stands for a version now; "*" is any, damaged ones too."""
        try:
            held = self._intact(name)
        except PromptNotFoundError:
            return False
        return version == "*" or (held is not None and held.version == version)

    def _condition(self, name: str, if_match: str | None, if_none_match: bool) -> Callable[[], None]:
        """What must hold when the folder is locked for writing."""

        def check() -> None:
            if if_match is not None and not self._stands_for(name, if_match):
                raise ConflictError(
                    f"prompt {name!r} is not version {if_match} (now): look at it again before you replace or remove it"
                )
            if if_none_match and self._stands_for(name, "*"):
                raise ConflictError(f"prompt {name!r} exists: choose another name, or replace it on purpose")

        return check
