"""Archives that nobody has checked: unpacked within bounds, or refused with a reason."""

import contextlib
import gzip
import io
import os
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residency_tools import constant, embedding, files, spec

from fastprompt import peft_format
from fastprompt.errors import FastPromptError, PromptFileError
from fastprompt.prompt_format import METADATA, WEIGHTS
from fastprompt.serving.archives import MAX_MEMBERS, unpack
from fastprompt.serving.registry import PromptRegistry
from fastprompt.serving.uploads import MAX_BYTES, parse_upload


def zipped(members, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", options.pop("method", zipfile.ZIP_DEFLATED), **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(members, mode="w", kind=tarfile.REGTYPE, form=tarfile.PAX_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (len(content) if kind == tarfile.REGTYPE else 0), kind, "target"
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


PACKERS = {
    "zip": zipped,
    "stored": lambda m: zipped(m, method=zipfile.ZIP_STORED),
    "tar": tarred,
    "gnu": lambda m: tarred(m, form=tarfile.GNU_FORMAT),
    "tar.gz": lambda m: tarred(m, "w:gz"),
    "two gzips": lambda m: b"".join(gzip.compress(half) for half in _halves(tarred(m))),
}


def _halves(data):
    return data[: len(data) // 2], data[len(data) // 2 :]


def refused(registry, data, match):
    with pytest.raises(PromptFileError, match=match):
        registry.put_archive("a", data)
    assert list(registry.folder.iterdir()) == [] and registry.names() == []


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("folder", ["", "my prompt/", "deep/er/", "./"])
def test_archives_of_a_folder(registry, pack, folder):
    members = {f"{folder}{name}": content for name, content in files(3).items()}
    members[f"{folder}.DS_Store"] = b"macOS"
    registry.put_archive("a", pack(members))
    assert torch.equal(registry.load(registry.current("a")).weights(), constant(3).weights())


def test_an_archive_of_an_adapter(registry, tmp_path):
    peft_format.write_peft(tmp_path / "adapter", embedding(3))
    members = {f"adapter/{path.name}": path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    registry.put_archive("a", zipped(members | {"adapter/README.md": b"# about"}))
    assert torch.equal(registry.load(registry.current("a")).weights(), embedding(3).weights())


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_an_archive_cut_anywhere_is_refused(registry, pack):
    whole = pack(files(3))
    everything = unpack(whole, MAX_BYTES)
    for cut in sorted({0, 1, 3, 100, 300, 512, 600, 2000, len(whole) // 3, len(whole) - 600, len(whole) - 1}):
        if cut < 2000:
            refused(registry, whole[:cut], "archive|upload")
        with contextlib.suppress(PromptFileError):  # a tar may end between two files, and its end is empty
            found = unpack(whole[:cut], MAX_BYTES)
            assert all(everything[name] == content for name, content in found.items())


@pytest.mark.parametrize("path", ["../x/", "/etc/", "a/../../", "..\\", "C:\\x\\"])
@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar"])
def test_paths_that_leave_the_archive_are_refused(registry, pack, path):
    refused(registry, pack({f"{path}{name}": content for name, content in files(1).items()}), "leaves it")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(registry, kind):
    refused(registry, tarred({METADATA: b""}, kind=kind), "not a plain file|cannot be read")


def test_a_link_in_a_zip_is_refused(registry):
    link = zipfile.ZipInfo(METADATA)
    link.external_attr = 0o120777 << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(registry, stream.getvalue(), "is a link")


def test_bombs_are_refused_before_they_unfold(tmp_path):
    registry = PromptRegistry(tmp_path, spec(), max_bytes=1 << 20)
    zeros = bytes(64 << 20)
    for data in (
        zipped({METADATA: zeros}),
        gzip.compress(zeros),
        tarred({METADATA: zeros}, "w:gz"),
        gzip.compress(gzip.compress(tarred({METADATA: zeros}))),
        zipped({f"{i}": b"" for i in range(MAX_MEMBERS + 1)}),
        zipped({f"{i}": b"" for i in range(20_000)}),
        tarred({f"{i}": b"" for i in range(MAX_MEMBERS + 1)}),
        zeros,
        zipped({METADATA: os.urandom(2 << 20)}, method=zipfile.ZIP_STORED),
    ):
        with pytest.raises(PromptFileError, match=r"more than|expected at most|begins with|cannot be read"):
            registry.put_archive("a", data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attributes", ["9", "1 comment=", "5 hdrcharset="])
def test_attributes_that_take_long_to_read_are_refused(registry, attributes):
    """tarfile looks for fields in a member's attributes, in some versions in quadratic time: an hour for megabytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info, content = tarfile.TarInfo("attributes"), (attributes * (4 << 20))[: 4 << 20].encode()
        info.type, info.size = tarfile.XHDTYPE, len(content)
        archive.addfile(info, io.BytesIO(content))
    refused(registry, stream.getvalue(), "a long name or attributes")
    refused(registry, gzip.compress(stream.getvalue()), "a long name or attributes")


def test_an_archive_of_very_many_gzips_is_refused(registry):
    refused(registry, gzip.compress(b"") * 100_000, "more than 64 members")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_plain_compression(registry, method):
    refused(registry, zipped(files(1), method=method), "plain .zip")


def test_other_things_in_an_archive(registry):
    members = files(1)
    refused(registry, zipped(members | {"adapter_model.bin": b"x"}), "is a pickle, and only safetensors")
    refused(registry, zipped({f"a/{METADATA}": members[METADATA], f"b/{WEIGHTS}": members[WEIGHTS]}), "2 folders")
    refused(registry, zipped(members | {f"./{METADATA}": b""}), "twice")
    refused(registry, members[WEIGHTS], "weights alone do not say")
    refused(registry, zipped({}), "expected|begins")
    refused(registry, zipped(members | {"run.sh": b"rm"}), r"holds \[.*run.sh.*expected prompt.json and")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(["", "PK\3\4", "\x1f\x8b\x08", "ustar"]))
def test_noise_is_refused(noise, start):
    data = bytes(257) + b"ustar" + noise if start == "ustar" else start.encode("latin1") + noise
    with pytest.raises(PromptFileError):
        parse_upload(unpack(data, MAX_BYTES), spec(), MAX_BYTES)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_archives_with_flipped_bytes(data):
    """Refused, or what was packed: checksums and digests leave nothing in between."""
    packed = bytearray(data.draw(st.sampled_from([pack(files(3)) for pack in PACKERS.values()])))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        got = parse_upload(unpack(bytes(packed), MAX_BYTES), spec(), MAX_BYTES)
    except FastPromptError:
        return
    assert got[WEIGHTS] == files(3)[WEIGHTS]


def test_the_size_limit(tmp_path):
    stored = files(1)
    size = sum(map(len, stored.values()))
    PromptRegistry(tmp_path, spec(), max_bytes=size).put("a", stored)
    small = PromptRegistry(tmp_path, spec(), max_bytes=size - 1)
    with pytest.raises(PromptFileError, match=f"{size} bytes, expected at most {size - 1}"):
        small.put("b", stored)
    with pytest.raises(PromptFileError, match="more than the limit"):
        small.put_archive("b", zipped(stored))
    assert small.names() == ["a"]
