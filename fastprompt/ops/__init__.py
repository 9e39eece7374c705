"""The public operations: checked, registered with torch, differentiable, and dispatched to an implementation."""

from fastprompt.ops.embed_prompts import embed_prompts
from fastprompt.ops.grouped_linear import grouped_linear
from fastprompt.ops.merge_states import merge_states
from fastprompt.ops.paged_prefix_attention import paged_prefix_attention
from fastprompt.ops.prefix_attention import prefix_attention

__all__ = ["embed_prompts", "grouped_linear", "merge_states", "paged_prefix_attention", "prefix_attention"]
