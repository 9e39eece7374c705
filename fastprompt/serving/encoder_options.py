"""What an `EncoderEngine` takes: its limits, and how long a text may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.model import PromptedModel
from fastprompt.prompts.base import check_choice, check_int
from fastprompt.serving.batcher import BatchLimits
from fastprompt.serving.host_copy import STORAGES
from fastprompt.serving.residency import HOST_BYTES

if TYPE_CHECKING:
    from fastprompt.serving.registry import PromptVersion

_UNKNOWN_LENGTH = 10**6  # tokenizers without a maximum say 10^30


@dataclass(frozen=True)
class EncoderOptions:
    """Limits of an `EncoderEngine`.

    `max_length` are tokens of a text, without virtual ones; None: what the backbone's positions and the tokenizer
    allow. Loaded prompts beyond `max_prompts` or `max_prompt_bytes` (of their files) make room for new ones. Copies of
    at most `host_bytes` stay in host memory, there as `storage` says. `threads` is for torch; None: as many as it has
    now.
    """

    batch: BatchLimits = field(default_factory=BatchLimits)
    max_length: int | None = None
    max_queued: int = 4096  # rows
    max_prompts: int = 1024
    max_prompt_bytes: int = 2**30
    host_bytes: int = HOST_BYTES
    storage: str = "model"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "max_queued", "max_prompts", "max_prompt_bytes", "threads"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_int("host_bytes", self.host_bytes, 0)
        check_choice("storage", self.storage, STORAGES)


@dataclass(frozen=True)
class TextLimits:
    """Texts a backbone takes: at most `max_length` tokens, `positions` with virtual ones, ids below `vocabulary`."""

    max_length: int
    positions: int
    vocabulary: int

    @staticmethod
    def of(model: PromptedModel, tokenizer: Any, options: EncoderOptions) -> TextLimits:
        config = model.backbone.config
        positions = model._info.max_positions or getattr(config, "max_position_embeddings", None)
        positions = positions or options.batch.max_tokens
        said = getattr(tokenizer, "model_max_length", _UNKNOWN_LENGTH)
        lengths = [positions, options.batch.max_tokens, said, options.max_length or positions]
        return TextLimits(min(lengths), positions, model.backbone.get_input_embeddings().weight.shape[0])

    def room(self, version: PromptVersion | None) -> int:
        """Tokens a text may have under a prompt."""
        return max(0, min(self.max_length, self.positions - (version.length if version else 0)))

    def check_prompt(self, version: PromptVersion) -> None:
        """Raise for a prompt that no text fits behind."""
        if not self.room(version):
            raise UnsupportedError(
                f"prompt {version.name!r} has {version.length} virtual tokens and the backbone {self.positions} "
                "positions: no text fits under this prompt, store a shorter one"
            )

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """Raise unless these are token ids of one text or several, none empty."""
        if not texts:
            raise ArgumentError("the request has no text, expected at least one")
        for i, ids in enumerate(texts):
            if not ids:
                raise ArgumentError(f"text {i} has no tokens, expected at least one")
            bad = [t for t in ids if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.vocabulary]
            if bad:
                raise ArgumentError(f"text {i} has token id {bad[0]!r:.40}, expected 0 to {self.vocabulary - 1}")
