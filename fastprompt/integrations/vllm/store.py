"""The folder that vLLM's processes read prompts from: which backbone, names, and a file a prefix."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from fastprompt.errors import ArgumentError, IncompatiblePromptError, PromptFileError, PromptNotFoundError
from fastprompt.folders import locked
from fastprompt.integrations.vllm.prefix_file import MappedPrefix, map_prefix
from fastprompt.integrations.vllm.tickets import Ticket, check_ticket
from fastprompt.serving.listing import is_prompt_name, settled
from fastprompt.spec import BackboneSpec

FORMAT = 1
GRACE_SECONDS = 3600.0  # how long a prefix that no name stands for is kept, for requests that asked before
_BACKBONE, _NAMES, _PREFIXES = "backbone.json", "names", "prefixes"
_JSON = ".json"
_ELSEWHERE = "remove it, or export into another folder"
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

    @property
    def exists(self) -> bool:
        """Whether the folder was made a store."""
        return (self.folder / _BACKBONE).exists()

    def backbone(self) -> StoreBackbone:
        """What the prefixes were made for. Errors: PromptFileError where the folder is no store."""
        fields = _read_json(self.folder / _BACKBONE, "export prompts into it: fastprompt export --format vllm")
        try:
            if fields["format"] != FORMAT:
                raise PromptFileError(
                    f"{self.folder} has format {fields['format']}, this fastprompt reads {FORMAT}: {_ELSEWHERE}"
                )
            return StoreBackbone(fields["model"], fields["dtype"], BackboneSpec.from_dict(fields["backbone"]))
        except (KeyError, TypeError) as error:
            raise PromptFileError(f"{self.folder / _BACKBONE} is malformed ({error!r}): {_ELSEWHERE}") from None

    def names(self) -> list[str]:
        """All names, sorted; the folder is listed again where its time has changed. Errors: PromptFileError."""
        folder = self.folder / _NAMES
        try:
            changed = os.stat(folder).st_mtime_ns
            if changed != self._names[0]:
                found = (name.removesuffix(_JSON) for name in os.listdir(folder) if name.endswith(_JSON))
                self._names = changed if settled(changed) else 0, sorted(filter(is_prompt_name, found))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PromptFileError(f"{folder} cannot be listed ({error})") from error
        return self._names[1]

    def current(self, name: str) -> Entry:
        """What a name stands for now. Errors: PromptNotFoundError; PromptFileError for a damaged entry."""
        unknown = PromptNotFoundError(f"prompt {name!r} is not in {self.folder}: export it first")
        if not is_prompt_name(name):
            raise unknown
        path = self._name_path(name)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            self._entries.pop(name, None)
            raise unknown from None
        except OSError as error:
            raise PromptFileError(f"{path} cannot be read ({error})") from error
        stamp = (status.st_ino, status.st_ctime_ns, status.st_size)
        held = self._entries.get(name)
        if held is not None and held[0] == stamp:
            return held[1]
        fields = _read_json(path, "export the prompt again")
        try:
            entry = Entry(**fields)
            check_ticket(entry.ticket)
        except (TypeError, ArgumentError) as error:
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
        path = self.folder / _BACKBONE
        with _writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                if not self.exists:
                    content = {"format": FORMAT, "model": backbone.model, "dtype": backbone.dtype}
                    _write(path, json.dumps(content | {"backbone": backbone.spec.to_dict()}, indent=1).encode())
                    return
        held = self.backbone()
        if (held.spec, held.dtype) != (backbone.spec, backbone.dtype):
            raise IncompatiblePromptError(
                f"{self.folder} holds prefixes for {held.spec.describe()} in {held.dtype}, these are for "
                f"{backbone.spec.describe()} in {backbone.dtype}: {_ELSEWHERE}"
            )

    def write_prefix(self, content: bytes) -> str:
        """Store a prefix file; its digest. One that is there and whole stays as it is."""
        digest = sha256(content).hexdigest()
        path = self._prefix_path(digest)
        with _writing(path), locked(self.folder):
            if _is_whole(path, digest):
                os.utime(path)  # as new: it is not collected before a name stands for it
            else:
                _write(path, content)
        return digest

    def set_name(self, name: str, entry: Entry, check: Callable[[], object] = lambda: None) -> None:
        """Let a name stand for an entry; what it stood for is kept a while.

        `check` is called while no other writer may write: what it raises stops the write.
        """
        self._change(name, check, lambda path: _write(path, json.dumps(asdict(entry), sort_keys=True).encode()))

    def remove_name(self, name: str, check: Callable[[], object] = lambda: None) -> None:
        """Forget a name; does nothing for one that is not there. `check` as in `set_name`."""
        self._change(name, check, lambda path: path.unlink(missing_ok=True))

    def collect(self, grace_seconds: float = GRACE_SECONDS) -> int:
        """Remove prefixes that no name has stood for in the last `grace_seconds`; how many.

        Errors: PromptFileError where an entry is damaged, as nobody knows what it stands for; nothing is removed then.
        """
        folder, oldest, removed = self.folder / _PREFIXES, time.time() - grace_seconds, 0
        with _writing(folder), locked(self.folder):
            used = set(self._used())
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if Path(entry.name).stem not in used and entry.stat().st_mtime < oldest:
                        os.unlink(entry.path)
                        removed += 1
        return removed

    def _used(self) -> Iterator[str]:
        for name in self.names():
            with contextlib.suppress(PromptNotFoundError):
                yield self.current(name).digest

    def _change(self, name: str, check: Callable[[], object], change: Callable[[Path], object]) -> None:
        path = self._name_path(name)
        with _writing(path), locked(self.folder):
            check()
            with contextlib.suppress(PromptNotFoundError, PromptFileError, OSError):  # its prefix counts as new
                os.utime(self._prefix_path(self.current(name).digest))
            change(path)
        self._entries.pop(name, None)

    def _name_path(self, name: str) -> Path:
        return self.folder / _NAMES / f"{name}{_JSON}"

    def _prefix_path(self, digest: str) -> Path:
        return self.folder / _PREFIXES / f"{digest}.safetensors"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in words what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PromptFileError(f"cannot write {path}: {error}; nothing was changed") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step."""
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


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False


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
