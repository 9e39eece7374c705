"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from fastprompt.errors import ArgumentError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(option: str, text: str | None) -> int | None:
    """`512M`, `1.5GiB` or plain bytes as a whole number of bytes; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ArgumentError(f"{option} is {text!r}, expected bytes such as 1073741824, 512M or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
