"""The folder that vLLM's processes read prompts from: which backbone, names, and a file a prefix."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from fastprompt.errors import IncompatiblePromptError, PromptFileError, PromptNotFoundError
from fastprompt.integrations.vllm.prefix_file import MappedPrefix, map_prefix
from fastprompt.integrations.vllm.tickets import Ticket
from fastprompt.serving.listing import is_prompt_name, settled
from fastprompt.spec import BackboneSpec

FORMAT = 1
GRACE_SECONDS = 3600.0  # how long a prefix that no name stands for is kept, for requests that asked before
_BACKBONE, _NAMES, _PREFIXES = "backbone.json", "names", "prefixes"
_CACHED = 16_384  # names whose entries are kept in memory


@dataclass(frozen=True)
class StoreBackbone:
    """The backbone that a store's prefixes were made for: where it was loaded from, its geometry, their dtype."""

    model: str
    dtype: str
    spec: BackboneSpec


@dataclass(frozen=True)
class Entry:
    """What a name stands for: the prefix to read, and the stored prompt that it was made from."""

    digest: str
    length: int
    version: str  # PromptVersion.version
    method: str
    kind: str
    bytes: int
    task_type: str | None
    created: float

    @property
    def ticket(self) -> Ticket:
        return Ticket(self.digest, self.length)


class PrefixStore:
    """Exported prompts in one folder, written by few and read by all processes of a server.

    Semantics:
        store.write_prefix(content)        # a file named by its digest, which never changes
        store.set_name("a", entry)         # in one step: a reader finds the old entry or the new one
        store.current("a").ticket          # as of now: looks at one file's time
        store.map(ticket.digest)           # checked whole, mapped
        store.collect()                    # removes prefixes that no name has stood for lately
    Readers need no right to write. All methods may be called from any thread.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self._entries: OrderedDict[str, tuple[tuple[int, int, int], Entry]] = OrderedDict()
        self._names: tuple[int, list[str]] = (0, [])

    # what is read ----------------------------------------------------------------------------------------------------

    def backbone(self) -> StoreBackbone:
        """What the prefixes were made for. Errors: PromptFileError where the folder is no store."""
        fields = _read_json(self.folder / _BACKBONE, "export prompts into it: fastprompt export --format vllm")
        try:
            if fields["format"] != FORMAT:
                raise PromptFileError(
                    f"{self.folder} has format {fields['format']}, this fastprompt reads {FORMAT}: export it again"
                )
            return StoreBackbone(fields["model"], fields["dtype"], BackboneSpec.from_dict(fields["backbone"]))
        except (KeyError, TypeError) as error:
            raise PromptFileError(f"{self.folder / _BACKBONE} is malformed ({error!r}): export it again") from None

    def names(self) -> list[str]:
        """All names, sorted; the folder is listed again where its time has changed."""
        try:
            changed = os.stat(self.folder / _NAMES).st_mtime_ns
            if changed != self._names[0]:
                found = (
                    name.removesuffix(".json") for name in os.listdir(self.folder / _NAMES) if name[-5:] == ".json"
                )
                self._names = changed if settled(changed) else 0, sorted(filter(is_prompt_name, found))
        except FileNotFoundError:
            return []
        return self._names[1]

    def current(self, name: str) -> Entry:
        """What a name stands for now. Errors: PromptNotFoundError; PromptFileError for a damaged entry."""
        if not is_prompt_name(name):
            raise PromptNotFoundError(f"prompt {name!r} is not in {self.folder}: export it first")
        path = self._name_path(name)
        try:
            status = os.stat(path)
        except OSError:
            self._entries.pop(name, None)
            raise PromptNotFoundError(f"prompt {name!r} is not in {self.folder}: export it first") from None
        stamp = (status.st_ino, status.st_ctime_ns, status.st_size)
        held = self._entries.get(name)
        if held is not None and held[0] == stamp:
            return held[1]
        fields = _read_json(path, "export the prompt again")
        try:
            entry = Entry(**fields)
        except TypeError as error:
            raise PromptFileError(f"{path} is malformed ({error}): export the prompt again") from None
        if settled(status.st_ctime_ns):
            self._entries[name] = stamp, entry
            while len(self._entries) > _CACHED:
                self._entries.popitem(last=False)
        return entry

    def map(self, digest: str) -> MappedPrefix:
        """The prefix of a digest. Errors: PromptFileError for one that is missing, truncated or altered."""
        return map_prefix(self._prefix_path(digest), digest)

    def has_prefix(self, digest: str) -> bool:
        """Whether the file of a digest is there, whatever it holds."""
        return self._prefix_path(digest).is_file()

    # what is written -------------------------------------------------------------------------------------------------

    def open_for(self, backbone: StoreBackbone) -> None:
        """Make the folder a store for a backbone, or see that it is one.

        Errors: IncompatiblePromptError for a store of another backbone; PromptFileError where the disk fails.
        """
        if (self.folder / _BACKBONE).exists():
            held = self.backbone()
            if (held.spec, held.dtype) != (backbone.spec, backbone.dtype):
                raise IncompatiblePromptError(
                    f"{self.folder} holds prefixes for {held.spec.describe()} in {held.dtype}, these are for "
                    f"{backbone.spec.describe()} in {backbone.dtype}: export into another folder"
                )
            return
        fields = {
            "format": FORMAT,
            "model": backbone.model,
            "dtype": backbone.dtype,
            "backbone": backbone.spec.to_dict(),
        }
        self._write(self.folder / _BACKBONE, json.dumps(fields, indent=1).encode())

    def write_prefix(self, content: bytes) -> str:
        """Store a prefix file; its digest. One that is there and whole stays as it is."""
        digest = sha256(content).hexdigest()
        path = self._prefix_path(digest)
        try:
            whole = sha256(path.read_bytes()).hexdigest() == digest
            if whole:
                os.utime(path)  # somebody may be collecting
        except OSError:
            whole = False
        if not whole:
            self._write(path, content)
        return digest

    def set_name(self, name: str, entry: Entry) -> None:
        """Let a name stand for an entry; what it stood for is kept a while."""
        self._release(name)
        self._write(self._name_path(name), json.dumps(asdict(entry), sort_keys=True).encode())
        self._entries.pop(name, None)

    def remove_name(self, name: str) -> None:
        """Forget a name; does nothing for one that is not there."""
        self._release(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name_path(name))
        self._entries.pop(name, None)

    def collect(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """Remove prefixes that no name has stood for in the last `grace_seconds`; how many."""
        oldest, removed = time.time() - grace_seconds, 0
        old = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / _PREFIXES) as entries:
            old = [e.path for e in entries if e.stat().st_mtime < oldest]
        used = self._used() if old else set()
        for path in old:
            if Path(path).stem not in used:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                    removed += 1
        return removed

    def _used(self) -> set[str]:
        used = set()
        for name in self.names():
            with contextlib.suppress(PromptNotFoundError):  # PromptFileError stops: its prefix is not known
                used.add(self.current(name).digest)
        return used

    def _release(self, name: str) -> None:
        """Restart the clock of the prefix that a name stands for."""
        with contextlib.suppress(PromptNotFoundError, PromptFileError, OSError):
            os.utime(self._prefix_path(self.current(name).digest))

    def _name_path(self, name: str) -> Path:
        return self.folder / _NAMES / f"{name}.json"

    def _prefix_path(self, digest: str) -> Path:
        return self.folder / _PREFIXES / f"{digest}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file in one step."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(descriptor)
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise PromptFileError(f"cannot write {path}: {error}; nothing was changed") from error


def _read_json(path: Path, remedy: str) -> dict:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PromptFileError(f"{path} does not exist: {remedy}") from None
    except (OSError, ValueError) as error:
        raise PromptFileError(f"{path} cannot be read ({error}): {remedy}") from None
    if not isinstance(fields, dict):
        raise PromptFileError(f"{path} is malformed: {remedy}")
    return fields
