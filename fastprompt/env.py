"""Every environment variable fastprompt reads, read here and nowhere else (table in docs/environment.md)."""

import os


def default_impl() -> str | None:
    """`FASTPROMPT_IMPL`: implementation the ops use when a call names none."""
    return os.environ.get("FASTPROMPT_IMPL") or None


def in_force() -> dict[str, str]:
    """The variables of this package that are set, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTPROMPT_")}
