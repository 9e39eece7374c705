"""Every environment variable fastprompt reads, read here and nowhere else (table in docs/environment.md)."""

import os


def default_impl() -> str | None:
    """`FASTPROMPT_IMPL`: implementation the ops use when a call names none."""
    return os.environ.get("FASTPROMPT_IMPL") or None
