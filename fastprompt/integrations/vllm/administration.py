"""The embedded server's endpoints for models and prompts, over a store of exported ones."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastprompt.errors import PromptChangedError, PromptFileError, PromptNotFoundError, UnsupportedError
from fastprompt.folders import replace_folder
from fastprompt.integrations.vllm.export import check_prompt, entry_of, store_prefix, while_stands
from fastprompt.integrations.vllm.store import GRACE_SECONDS, Entry, PrefixStore
from fastprompt.prompt_format import METADATA, WEIGHTS, parse_metadata, parse_prompt
from fastprompt.prompts import SoftPrompt
from fastprompt.serving.archives import unpack
from fastprompt.serving.http.errors import ApiError
from fastprompt.serving.listing import check_prompt_name
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.uploads import MAX_BYTES, parse_upload
from fastprompt.serving.versions import PromptVersion
from fastprompt.spec import unflatten


class ExportedPrompts:
    """A store as the routes of the embedded server see a registry; writes go to a folder of prompts first.

    Semantics:
        current, names         the store's: what requests are answered under
        put, put_archive       checked whole; made a prefix, an embedding prompt in a process that loads the backbone;
                               stored in the folder; exported
        delete                 out of the folder, out of the store
    Without a folder of prompts nothing can be written (403).
    """

    def __init__(self, store: PrefixStore, prompts: Path | None) -> None:
        self.store = store
        self._collected = time.monotonic()  # as of the start, when the folder was exported
        self._registry = None if prompts is None else PromptRegistry(prompts, store.backbone().spec)

    def __len__(self) -> int:
        return len(self.store.names())

    def __contains__(self, name: object) -> bool:
        try:
            self._intact(str(name))
        except PromptNotFoundError:
            return False
        return True

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Sorted names, those behind `after` only and at most `limit` of them."""
        names = self.store.names()
        behind = names if after is None else [name for name in names if name > after]
        return behind[:limit]

    def current(self, name: str) -> PromptVersion:
        """What a name stands for now. Errors: PromptNotFoundError, PromptFileError."""
        entry = self.store.current(name)
        return PromptVersion(
            name=name,
            version=entry.version,
            method=entry.method,
            kind=entry.kind,
            length=entry.length,
            bytes=entry.bytes,
            labels=None,
            task_type=entry.task_type,
            folder=self.store.folder,
            created=entry.created,
        )

    def created(self, name: str) -> float:
        """When what a name stands for was stored, in seconds since 1970. Errors: as `current`."""
        return self.store.current(name).created

    def put(
        self, name: str, files: Mapping[str, bytes], *, if_match: str | None = None, if_none_match: bool = False
    ) -> PromptVersion:
        """Store and export a prompt; arguments and errors as `PromptRegistry.put`, and UnsupportedError."""
        registry = self._writable()
        check_prompt_name(name)
        stored = parse_upload(files, registry.spec, registry.max_bytes)
        prompt = parse_prompt(
            parse_metadata(stored[METADATA], METADATA), stored[WEIGHTS], registry.spec, where="upload"
        )
        check_prompt(name, prompt)
        digest = self._digest(prompt, stored)
        version = registry.put(name, stored, if_match=if_match, if_none_match=if_none_match)
        with suppress(PromptChangedError):  # somebody else replaced it already, and what they stored stays
            self.store.set_name(name, entry_of(version, digest), while_stands(registry, name, version.version))
        self._collect()
        return version

    def put_archive(self, name: str, data: bytes, **conditions: Any) -> PromptVersion:
        """As `put`, from a .zip, .tar or .tar.gz of these files."""
        return self.put(name, unpack(data, MAX_BYTES), **conditions)

    def delete(self, name: str, *, if_match: str | None = None) -> Entry | None:
        """Remove a prompt from the folder and the store; what it was, None for a damaged one.

        Errors: PromptNotFoundError, ConflictError.
        """
        registry, held = self._writable(), self._intact(name)
        try:
            registry.delete(name, if_match=if_match)
        except PromptNotFoundError:  # it was exported from elsewhere, or removed by somebody else
            if if_match not in (None, "*", held and held.version):
                raise
        with suppress(PromptChangedError):  # somebody else stored another one already
            self.store.remove_name(name, while_stands(registry, name, None))
        self._collect()
        return held

    def _intact(self, name: str) -> Entry | None:
        """What a name stands for, None for a damaged entry. Errors: PromptNotFoundError."""
        try:
            return self.store.current(name)
        except PromptFileError:
            return None

    def _collect(self) -> None:
        """Now and then, remove what replaced and deleted prompts left."""
        now = time.monotonic()
        if now - self._collected > GRACE_SECONDS:
            self._collected = now
            with suppress(PromptFileError):
                self.store.collect()

    def _digest(self, prompt: SoftPrompt, stored: Mapping[str, bytes]) -> str:
        """The digest of the prompt's prefix, which is in the store then."""
        if prompt.kind == "prefix":
            spec = self.store.backbone().spec
            return store_prefix(self.store, unflatten(prompt.weights(), spec, prompt.config.prefix_layers(spec)))
        with tempfile.TemporaryDirectory() as folder:
            replace_folder(Path(folder, "prompt"), stored, overwrite=False)
            return compile_apart(self.store, Path(folder, "prompt"))

    def _writable(self) -> PromptRegistry:
        if self._registry is None:
            raise ApiError(
                403, "this server has no folder of prompts to write to: export prompts into its store", code="read_only"
            )
        return self._registry


def compile_apart(store: PrefixStore, prompt: Path) -> str:
    """The digest of an embedding prompt's prefix, computed and stored by a process that loads the backbone."""
    command = [sys.executable, "-m", "fastprompt.integrations.vllm.compile", str(store.folder), str(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise UnsupportedError(f"the prompt could not be compiled for vLLM: {said[-1]}")
    digest: str = json.loads(done.stdout.splitlines()[-1])["digest"]
    return digest


class Residency:
    """What the routes ask about memory: vLLM decides which pages stay, prompt by prompt nothing is kept."""

    def pinned(self) -> dict[str, bool]:
        return {}

    def tier(self, version: str) -> str:
        return "disk"

    def drop(self, name: str) -> None:
        """A replaced prompt's pages are found under its old digest only."""


class Face:
    """vLLM's engine as the embedded server's routes see one; `start` says under which name it serves the backbone."""

    def __init__(self, registry: ExportedPrompts) -> None:
        self.registry, self.residency, self.tokenizer = registry, Residency(), None
        self.name = ""
        self.alive = self.ready = False
        self.observe: Callable[[Any], None] = lambda finished: None

    def serve(self, name: str) -> None:
        """Note that vLLM has started."""
        self.name, self.alive, self.ready = name, True, True
