"""What a client uploads, checked whole and brought into the form that is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from fastprompt import peft_format
from fastprompt.errors import ArgumentError, FastPromptError, PromptFileError
from fastprompt.peft_format import layout
from fastprompt.prompt_format import METADATA, WEIGHTS, parse_metadata, parse_prompt, prompt_files, sha256
from fastprompt.spec import BackboneSpec

MAX_BYTES = 64 << 20
OWN, PEFT = (METADATA, WEIGHTS), (layout.CONFIG, layout.WEIGHTS)
NEEDED = f"expected {' and '.join(OWN)}, or a PEFT adapter's {' and '.join(PEFT)}"
_LONGEST = 1000  # characters of an error
_BESIDE = ("README.md", ".gitattributes")  # PEFT and the hub put these beside an adapter


def parse_upload(files: Mapping[str, bytes], spec: BackboneSpec, max_bytes: int) -> dict[str, bytes]:
    """The files to store for an upload of `files` (name -> content) to the backbone `spec`; an adapter is converted.

    Errors: PromptFileError for files that are damaged, missing, unknown or together above `max_bytes`;
    IncompatiblePromptError, UnsupportedError for a prompt that this backbone cannot take.
    """
    try:
        return _parse(files, spec, max_bytes)
    except FastPromptError as error:
        if len(text := str(error)) > _LONGEST:  # it quotes the upload
            raise type(error)(f"{text[:_LONGEST]}...") from None
        raise


def _parse(files: Mapping[str, bytes], spec: BackboneSpec, max_bytes: int) -> dict[str, bytes]:
    given = {name: content for name, content in files.items() if name not in _BESIDE}
    size = sum(map(len, given.values()))
    if size > max_bytes:
        raise PromptFileError(f"the upload has {size} bytes, expected at most {max_bytes}")
    if set(given) == set(OWN):
        metadata = parse_metadata(given[METADATA], METADATA)
        if sha256(given[WEIGHTS]) != metadata["sha256"]:
            raise PromptFileError(
                f"{WEIGHTS} ({len(given[WEIGHTS])} bytes) does not match the digest in {METADATA}: it is truncated or "
                "altered; upload the prompt again"
            )
        parse_prompt(metadata, given[WEIGHTS], spec, where="upload")
        return given
    if set(given) == set(PEFT):
        config, weights = (given[name] for name in PEFT)
        try:
            return prompt_files(peft_format.prompt_from_peft_files(config, weights, spec, where="upload"))
        except ArgumentError as error:
            raise PromptFileError(f"upload: {error}") from None
    names = sorted(PurePath(name).name for name in given)[:8]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]
    why = f"; {pickled[0]} is a pickle, and only safetensors is read" if pickled else ""
    raise PromptFileError(f"the upload holds {names}, {NEEDED}{why}")
