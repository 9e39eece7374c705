"""Every error that fastprompt raises on purpose.

Each message names the argument, what came, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class FastPromptError(Exception):
    """Base class: catch it to catch every deliberate error of this package."""


class ArgumentError(FastPromptError, ValueError):
    """An argument has a wrong shape, dtype, device or value."""


class ImplementationError(FastPromptError, RuntimeError):
    """An implementation was asked for explicitly and cannot run."""


class PromptNotFoundError(FastPromptError, KeyError):
    """No prompt of that name is known."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class DuplicatePromptError(FastPromptError, ValueError):
    """A prompt of that name exists already."""


class IncompatiblePromptError(FastPromptError, ValueError):
    """A prompt was made for another backbone."""


class PromptFileError(FastPromptError, ValueError):
    """A stored prompt is missing, truncated, altered or in a format that is not read."""


class PromptChangedError(PromptFileError):
    """A stored prompt was replaced or removed after it was looked up: look it up again."""


class ConflictError(FastPromptError, RuntimeError):
    """A stored prompt is not the version that a write was to replace; nothing was changed."""


class UnsupportedError(FastPromptError, NotImplementedError):
    """The backbone's architecture cannot do what was asked."""


class BankFullError(FastPromptError, MemoryError):
    """The bank's byte budget cannot hold a prompt even after eviction."""


class ConfigError(FastPromptError, ValueError):
    """A config file is wrong; `problems` has one line for each thing that is."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class TrainingError(FastPromptError, ValueError):
    """A training run cannot start; `problems` has every reason, one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"training cannot start, {len(problems)} to put right:", *problems]))
        self.problems = tuple(problems)
