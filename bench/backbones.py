"""Backbones with random weights, twins that share them, and PEFT models over a twin."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel  # a peer, which a machine may lack

VOCABULARY = 8000  # small: a large output layer would hide what attention costs
INIT_STD = 0.5  # of random prefixes: about the size of the backbone's own keys and values


@dataclass(frozen=True)
class LlamaSize:
    """A Llama-like decoder; the default is the one speed targets are stated for."""

    layers: int = 12
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 4
    intermediate: int = 2816
    vocabulary: int = VOCABULARY

    def describe(self) -> str:
        """One line for reports."""
        return (
            f"Llama-like, {self.layers} layers, d {self.hidden}, {self.heads}/{self.kv_heads} heads, "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary}, float32, random weights"
        )


def llama(size: LlamaSize, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """A frozen decoder in evaluation mode, without special tokens: generation never stops early."""
    config = LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of weights; what rotary embeddings start from stays float32
    try:
        with torch.device(device):
            model: PreTrainedModel = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(False)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with modules and config of its own over the same weights."""
    shared = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


def with_peft(model: PreTrainedModel, adapters: Mapping[str, Path]) -> PeftModel:
    """A twin of `model` under PEFT with every adapter folder loaded under its name."""
    from peft import PeftModel

    names = list(adapters)
    prompted = PeftModel.from_pretrained(twin(model), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        prompted.load_adapter(adapters[name], adapter_name=name)
    return prompted.eval()


def random_text(size: LlamaSize, rows: int, tokens: int, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """`input_ids` and `attention_mask` int64 `[rows, tokens]` without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.vocabulary, (rows, tokens), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(new: int) -> dict[str, Any]:
    """Options of `generate` for exactly so many new tokens, each the likeliest."""
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
