"""A prefix as one file: its keys and values in the order in which vLLM's pages take them, mapped and not read."""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import torch as safetensors_torch

from fastprompt.errors import PromptFileError
from fastprompt.spec import Prefix

Stamp = tuple[int, int, int, int]


def prefix_bytes(prefix: Prefix, dtype: torch.dtype) -> bytes:
    """A safetensors file with "keys" `[L, P, Hkv, D]` and "values" `[L, P, Hkv, Dv]`; equal prefixes, equal bytes."""
    keys, values = (torch.stack([t.detach().to("cpu", dtype).transpose(0, 1) for t in side]).contiguous()
                    for side in (prefix.keys, prefix.values))  # fmt: skip
    return safetensors_torch.save({"keys": keys, "values": values})


@dataclass(frozen=True, eq=False)
class MappedPrefix:
    """A prefix file in memory, read as far as it is touched: "keys" and "values" as `prefix_bytes` lays them out."""

    path: Path
    stamp: Stamp
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def bytes(self) -> int:
        """Of the file."""
        return self.stamp[1]

    @property
    def unchanged(self) -> bool:
        """Whether the file is as it was when it was checked: not written to, touched, replaced or removed."""
        try:
            return _stamp(os.stat(self.path)) == self.stamp
        except OSError:
            return False


def map_prefix(path: Path, digest: str) -> MappedPrefix:
    """Map a prefix file whose SHA-256 must be `digest`.

    Errors: PromptFileError for a file that is missing, truncated or altered.
    """
    try:
        with open(path, "rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch asks for memory it may write
    except FileNotFoundError:
        raise PromptFileError(f"{path} does not exist: the prompt was removed, or never exported") from None
    except (OSError, ValueError) as error:
        raise PromptFileError(f"{path} cannot be mapped ({error}): export the prompt again") from None
    if sha256(mapped).hexdigest() != digest:
        raise PromptFileError(f"{path} does not match its digest: it is truncated or altered; export the prompt again")
    try:
        keys, values = (_tensor(mapped, name) for name in ("keys", "values"))
    except (KeyError, ValueError, TypeError, struct.error) as error:
        raise PromptFileError(f"{path} is no prefix file ({error!r}): export the prompt again") from None
    return MappedPrefix(path, stamp, keys, values)


def _tensor(mapped: mmap.mmap, name: str) -> torch.Tensor:
    """A tensor of a safetensors file, in place: 8 bytes of length, a JSON header, the numbers."""
    (size,) = struct.unpack("<Q", mapped[:8])
    entry = json.loads(mapped[8 : 8 + size])[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
    shape, begin = entry["shape"], 8 + size + entry["data_offsets"][0]
    count = 1
    for extent in shape:
        count *= extent
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).view(shape)


def _stamp(status: os.stat_result) -> Stamp:
    """What changes whenever a file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
