"""A prefix as one file: its keys and values in the order in which vLLM's pages take them, mapped and not read."""

from __future__ import annotations

import json
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
    def unchanged(self) -> bool:
        """Whether the file is as it was when it was checked: not written to, touched, replaced or removed."""
        try:
            return _stamp(os.stat(self.path)) == self.stamp
        except OSError:
            return False


def map_prefix(path: Path, digest: str) -> MappedPrefix:
    """Map a prefix file whose SHA-256 must be `digest`; no file descriptor stays open.

    Errors: PromptFileError for a file that is missing, truncated or altered.
    """
    try:
        stamp = _stamp(os.stat(path))
        content = torch.from_file(os.fspath(path), shared=False, size=stamp[1], dtype=torch.uint8)
    except FileNotFoundError:
        raise PromptFileError(f"{path} does not exist: the prompt was removed, or never exported") from None
    except (OSError, RuntimeError) as error:
        raise PromptFileError(f"{path} cannot be mapped ({error}): export the prompt again") from None
    if sha256(content.numpy().data).hexdigest() != digest:
        raise PromptFileError(f"{path} does not match its digest: it is truncated or altered; export the prompt again")
    try:
        keys, values = (_tensor(content, name) for name in ("keys", "values"))
    except (KeyError, ValueError, TypeError, struct.error, RuntimeError) as error:
        raise PromptFileError(f"{path} is no prefix file ({error!r}): export the prompt again") from None
    return MappedPrefix(path, stamp, keys, values)


def _tensor(content: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor of a safetensors file, in place: 8 bytes of length, a JSON header, the numbers."""
    (size,) = struct.unpack("<Q", bytes(content[:8].numpy().data))
    entry = json.loads(bytes(content[8 : 8 + size].numpy().data))[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
    begin, end = (8 + size + offset for offset in entry["data_offsets"])
    return content[begin:end].view(dtype).view(entry["shape"])


def _stamp(status: os.stat_result) -> Stamp:
    """What changes whenever a file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
