"""What rows are padded with: a token that the backbone has an embedding for."""

from __future__ import annotations

from typing import Any


def pad_token_id(model: Any) -> int:
    """The backbone's own padding token, by which some find a row's end, or the tokenizer's.

    Any token will do where neither is one that the backbone has: it is masked.
    """
    known = (own_pad(model.backbone), getattr(model.tokenizer, "pad_token_id", None))
    return next((pad for pad in known if pad is not None and 0 <= pad < embeddings(model.backbone)), 0)


def own_pad(backbone: Any) -> int | None:
    """The padding token that the backbone's config names."""
    pad = getattr(backbone.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def embeddings(backbone: Any) -> int:
    """How many tokens the backbone has an embedding for; a tokenizer may have more."""
    return backbone.get_input_embeddings().weight.shape[0]
