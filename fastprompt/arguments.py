"""What a call of an op asks for, as its implementations get it: checked, and no default left open.

One tuple an op that takes many arguments. The schema of its registered op is made from it, in its order.
"""

from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class PrefixAttention(NamedTuple):
    """Arguments of `ops.prefix_attention`, shaped as there."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    prefix_start: Tensor
    prefix_len: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    prefix_bias: Tensor | None
    kv_start: Tensor | None
    kv_len: Tensor | None
    q_start: Tensor | None
    causal: bool
    scale: float
    window: int | None
    softcap: float | None


class PagedPrefixAttention(NamedTuple):
    """Arguments of `ops.paged_prefix_attention`, shaped as there."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    q_start: Tensor
    kv_len: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    prefix_start: Tensor
    prefix_len: Tensor
    sinks: Tensor | None
    scale: float
    window: int | None
    softcap: float | None


class EmbedPrompts(NamedTuple):
    """Arguments of `ops.embed_prompts`, shaped as there; `left` is the padding's side."""

    input_ids: Tensor
    weight: Tensor
    prompts: Tensor
    prompt_start: Tensor
    prompt_len: Tensor
    positions: Tensor | None
    text_start: Tensor | None
    text_len: Tensor | None
    left: bool
    out_len: int
    scale: float | None


_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
}


def schema(arguments: type[tuple[Any, ...]]) -> str:
    """How a registered op declares these arguments."""
    return ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(arguments).items())
