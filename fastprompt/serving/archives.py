"""The files in an uploaded archive, which nobody has checked: read in memory, within limits, nothing extracted."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath

from fastprompt.errors import FastPromptError, PromptFileError

MAX_MEMBERS = 64
_LONGEST_HEADER = 4096  # bytes of a tar member's name and attributes: tarfile takes quadratic time over them
_SLACK = 1 << 20  # bytes of an archive that are not its files' contents


def unpack(data: bytes, max_bytes: int) -> dict[str, bytes]:
    """Files of a .zip, .tar or .tar.gz, name -> content; all of them in one folder, which may be at any depth.

    Semantics: nothing is written anywhere, links and devices are refused, names lose their folders, and no more than
    `max_bytes` are unpacked, whatever the archive says of itself. Hidden files are left out. Errors: PromptFileError.
    """
    if len(data) > max_bytes + _SLACK:
        raise PromptFileError(f"the archive has {len(data)} bytes, expected at most {max_bytes}")
    files: dict[str, bytes] = {}
    folders = set()
    try:
        for path, content in _members(data, max_bytes):
            if path.name.startswith("."):
                continue
            if path.name in files:
                raise PromptFileError(f"the archive holds {path.name} twice, expected the files of one prompt")
            files[path.name] = content
            folders.add(path.parent)
    except FastPromptError:
        raise
    except Exception as error:  # whatever a broken or hostile archive makes of its reader
        raise PromptFileError(f"the archive cannot be read ({error}): it is truncated, altered or encrypted") from None
    if len(folders) > 1:
        raise PromptFileError(f"the archive has files in {len(folders)} folders, expected the files of one prompt")
    return files


def _members(data: bytes, max_bytes: int) -> Iterator[tuple[PurePosixPath, bytes]]:
    if data[:4] == b"PK\3\4":
        return _zip_members(data, max_bytes)
    if data[:2] == b"\x1f\x8b":
        return _tar_members(_gunzip(data, max_bytes + _SLACK), max_bytes)
    if data[257:262] == b"ustar":
        return _tar_members(data, max_bytes)
    raise PromptFileError(
        f"the upload begins with {data[:8]!r}: expected a .zip, .tar or .tar.gz with a prompt's files (weights alone "
        "do not say what they are)"
    )


def _zip_members(data: bytes, max_bytes: int) -> Iterator[tuple[PurePosixPath, bytes]]:
    if data.count(b"PK\1\2") > 4 * MAX_MEMBERS:  # every entry of the directory begins so
        raise _too_many()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > MAX_MEMBERS:
            raise _too_many()
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise PromptFileError(f"the archive's {entry.filename} is not deflated: make a plain .zip")
            if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                raise PromptFileError(f"the archive's {entry.filename} is a link: pack the file itself")
            with archive.open(entry) as stream:
                content = stream.read(max_bytes + 1)
            max_bytes -= _checked(len(content), max_bytes)
            yield _path(entry.filename), content


class _Headers(io.BytesIO):
    """An archive of which only headers are read, none of them a long one."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise PromptFileError("the archive has a member with a long name or attributes: pack the prompt's files")
        return super().read(size)


def _tar_members(data: bytes, max_bytes: int) -> Iterator[tuple[PurePosixPath, bytes]]:
    with tarfile.open(fileobj=_Headers(data), mode="r:") as archive:
        for count, member in enumerate(archive):
            if count >= MAX_MEMBERS:
                raise _too_many()
            if member.isdir():
                continue
            if member.issparse() or not member.isreg():
                raise PromptFileError(f"the archive's {member.name} is not a plain file: pack the file itself")
            max_bytes -= _checked(member.size, max_bytes)
            content = data[member.offset_data : member.offset_data + member.size]
            if len(content) != member.size:
                raise PromptFileError(f"the archive ends inside {member.name}: it is truncated")
            yield _path(member.name), content


def _gunzip(data: bytes, most: int) -> bytes:
    """All members of a gzip stream, which together may have `most` bytes."""
    pieces: list[bytes] = []
    while data[:2] == b"\x1f\x8b":
        if len(pieces) == MAX_MEMBERS:
            raise _too_many()
        stream = zlib.decompressobj(wbits=31)
        piece = stream.decompress(data, most + 1)
        most -= _checked(len(piece), most)
        if not stream.eof:
            raise PromptFileError("the archive ends early: it is truncated")
        pieces.append(piece)
        data = stream.unused_data
    return b"".join(pieces)


def _checked(size: int, most: int) -> int:
    if size > most:
        raise PromptFileError(
            f"the archive unpacks to {size - most} bytes more than the limit: make the prompt smaller"
        )
    return size


def _too_many() -> PromptFileError:
    return PromptFileError(f"the archive has more than {MAX_MEMBERS} members, expected the files of one prompt")


def _path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise PromptFileError(f"the archive holds {name!r}, a path that leaves it: pack the prompt's folder itself")
    return path
