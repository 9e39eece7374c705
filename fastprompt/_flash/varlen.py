"""One call of flash-attn on packed queries and keys that lie in pieces, with its traps taken out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.errors import ImplementationError


class Piece(NamedTuple):
    """Queries `first_query .. end_query - 1` see the keys `first_key .. end_key - 1`, or those causality leaves.

    Causality: the last query sees the last key.
    """

    first_query: int
    end_query: int
    first_key: int
    end_key: int


def attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`out [tokens, Hq, D]` and natural-log `lse [Hq, tokens]`, 0 and -inf where a query is in no piece.

    `q [tokens, Hq, D]`, `k` and `v` `[keys, Hkv, D]`; pieces in order, both their queries and their keys apart.
    """
    from flash_attn import flash_attn_varlen_func

    queries, keys = bounds(pieces, q.shape[0])
    cumulative = torch.tensor([queries, keys], dtype=torch.int32).to(q.device)
    longest = [max(b - a for a, b in pairwise(at)) for at in (queries, keys)]
    # For a longest sequence of one query, flash-attn takes every sequence to have one: never say 1.
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cumulative[0], cumulative[1], max(longest[0], 2), max(longest[1], 1),
        softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    if lse.shape != (q.shape[1], q.shape[0]):
        raise ImplementationError(
            f"flash-attn returned lse of shape {list(lse.shape)}, expected [heads, tokens] = "
            f"{[q.shape[1], q.shape[0]]}; install flash-attn 2.7 or later"
        )
    return out, lse.masked_fill(lse == float("inf"), -float("inf"))  # +inf is its log of an empty sum


def bounds(pieces: Sequence[Piece], tokens: int) -> tuple[list[int], list[int]]:
    """Cumulative lengths of sequences that cover all queries and lead to every piece's keys.

    Keys between pieces belong to sequences without queries, queries between them to sequences without keys.
    """
    queries, keys = [0], [0]

    def until(query: int, key: int) -> None:
        queries.append(query)
        keys.append(key)

    for piece in pieces:
        if piece.first_key > keys[-1]:
            until(queries[-1], piece.first_key)
        if piece.first_query > queries[-1]:
            until(piece.first_query, keys[-1])
        until(piece.end_query, piece.end_key)
    if queries[-1] < tokens:
        until(tokens, keys[-1])
    return queries, keys
