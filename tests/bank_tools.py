"""Prefixes to put into a bank, and ways to look at what it holds."""

import torch

from fastprompt.bank import Entry, PromptBank
from fastprompt.spec import LayerShape, Prefix

EQUAL = (LayerShape(2, 4, 4),) * 3
RAGGED = (LayerShape(2, 4, 4), LayerShape(1, 6, 2), LayerShape(3, 2, 5))
TOKEN_BYTES = sum(s.width for s in EQUAL) * 4


def make_prefix(length, shapes=EQUAL, layers=None, seed=0, dtype=torch.float32):
    layers = tuple(range(len(shapes))) if layers is None else layers
    rng = torch.Generator().manual_seed(seed)

    def tensor(heads, dim):
        return torch.randn(heads, length, dim, generator=rng).to(dtype)

    keys = tuple(tensor(shapes[i].kv_heads, shapes[i].key_dim) for i in layers)
    values = tuple(tensor(shapes[i].kv_heads, shapes[i].value_dim) for i in layers)
    return Prefix(layers, keys, values)


def holds(bank: PromptBank, entry: Entry, prefix: Prefix) -> bool:
    """Whether the arena has the prefix, bit for bit, where the entry says."""
    span = slice(entry.start, entry.start + entry.length)
    return (entry.length, entry.layers) == (prefix.length, prefix.layers) and all(
        torch.equal(arena(layer)[:, span], tensor.to(arena(layer).dtype))
        for arena, tensors in ((bank.keys, prefix.keys), (bank.values, prefix.values))
        for layer, tensor in zip(prefix.layers, tensors, strict=True)
    )


def filled(lengths, tokens):
    """A bank of exactly `tokens` tokens with prompts "0", "1", ... of the lengths given, and their prefixes."""
    bank = PromptBank(EQUAL, bytes=tokens * TOKEN_BYTES)
    prefixes = {str(i): make_prefix(n, seed=i) for i, n in enumerate(lengths)}
    for name, prefix in prefixes.items():
        bank.put(name, prefix, "v1")
    return bank, prefixes


def snapshot(bank):
    """Everything a failed call must leave as it was."""
    with bank.pin(bank.names()) as entries:
        data = [bank.keys(0)[:, e.start : e.start + e.length].clone() for e in entries]
    return bank.stats(), bank.names(), entries, data


def assert_unchanged(bank, before):
    stats, names, entries, data = snapshot(bank)
    assert (names, entries) == before[1:3]
    assert all(torch.equal(a, b) for a, b in zip(data, before[3], strict=True))
    counters = ("prompts", "tokens", "capacity", "largest_free", "evictions", "compactions", "generation", "retired")
    assert all(getattr(stats, c) == getattr(before[0], c) for c in counters)
