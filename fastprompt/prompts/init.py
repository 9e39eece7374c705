"""Where the first values of a prompt come from: the backbone's own tokens, by name or by sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch

from fastprompt.errors import ArgumentError
from fastprompt.spec import BackboneSpec, Prefix, flatten


@runtime_checkable
class InitSource(Protocol):
    """What an init may ask of a backbone and its tokenizer; the prompted model implements it."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that have an embedding."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """`[n, E]` embeddings of int64 `ids` `[n]`, as the backbone's input embedding module gives them."""
        ...

    def activations(self, ids: torch.Tensor) -> Prefix:
        """Keys and values of every prefix layer after running int64 `ids` `[n]` through the bare backbone."""
        ...


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded, then put its state back; None leaves it alone."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"seed is {seed!r}, expected an int of 64 bits, or None") from None
    try:
        yield
    finally:
        torch.set_rng_state(state)


def need_source(source: InitSource | None, init: str) -> InitSource:
    """`source`, or an error that says what to pass."""
    if source is None:
        raise ArgumentError(
            f'init="{init}" reads the backbone\'s tokens but source is None: pass an InitSource to build() '
            '(PromptedModel.add_prompt does), or choose init="random"'
        )
    return source


def text_ids(source: InitSource, text: str, length: int | None = None) -> torch.Tensor:
    """Token ids of `text` `[n]`, repeated or cut to `length` when it is given."""
    ids = source.tokenize(text)
    if not ids:
        raise ArgumentError(f"init text {text!r} has no tokens: give a text with at least one")
    if length is not None:
        ids = (ids * -(-length // len(ids)))[:length]
    return torch.tensor(ids, dtype=torch.long)


def token_rows(source: InitSource, ids: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """Float32 CPU copies `[n, E]` of the embeddings of `ids`."""
    rows = source.token_embeddings(ids).detach().to("cpu", torch.float32)
    if rows.shape != (len(ids), spec.hidden_size):
        raise ArgumentError(
            f"source.token_embeddings gave shape {list(rows.shape)}, expected [{len(ids)}, {spec.hidden_size}] "
            f"for {spec.describe()}"
        )
    return rows


def sampled_rows(source: InitSource, count: int, top: int, spec: BackboneSpec) -> torch.Tensor:
    """Embeddings `[count, E]` of tokens drawn from the first `top` ids, without repeats while they last."""
    pool = min(top, source.vocab_size)
    ids = torch.randperm(pool)[:count] if count <= pool else torch.randint(pool, (count,))
    return token_rows(source, ids, spec)


def label_rows(source: InitSource, labels: Sequence[str], count: int, top: int, spec: BackboneSpec) -> torch.Tensor:
    """One row a label, the mean of its sub-pieces' embeddings, and sampled tokens for the rest of `count` rows."""
    rows = [token_rows(source, text_ids(source, label), spec).mean(0, keepdim=True) for label in labels]
    return torch.cat([*rows, sampled_rows(source, count - len(labels), top, spec)])


def activation_rows(
    source: InitSource, text: str, length: int, spec: BackboneSpec, sites: Sequence[int]
) -> torch.Tensor:
    """Flat `[length, width]` keys and values that the bare backbone computes for `text` in `sites`."""
    prefix = source.activations(text_ids(source, text, length))
    if not set(sites) <= set(prefix.layers) or prefix.length != length:
        raise ArgumentError(
            f"source.activations gave {prefix.length} tokens for layers {list(prefix.layers)}, expected {length} "
            f"tokens for layers {list(sites)}"
        )
    return flatten(prefix.only(sites).map(lambda t: t.detach().to("cpu", torch.float32)))
