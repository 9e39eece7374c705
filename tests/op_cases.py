"""Inputs for the tests of the ops, and comparisons of an op with its oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastprompt import native

INF = float("inf")
DIFFERENTIABLE = ("q", "k", "v", "prefix_k", "prefix_v", "sinks", "bias", "prefix_bias")
_POSITIONAL = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_start", "prefix_len")


@dataclass(frozen=True)
class Attention:
    """Arguments of one prefix_attention call: tensors and settings by name."""

    tensors: dict[str, Tensor]
    settings: dict = field(default_factory=dict)

    def __call__(self, op: Callable, **more):
        tensors = dict(self.tensors)
        args = [tensors.pop(name) for name in _POSITIONAL]
        return op(*args, **tensors, **self.settings, **more)

    def with_tensors(self, **changed: Tensor) -> Attention:
        return replace(self, tensors={**self.tensors, **changed})

    def map(self, function: Callable[[Tensor], Tensor]) -> Attention:
        """The call with `function` applied to every floating point tensor."""
        return replace(self, tensors={n: function(t) if t.is_floating_point() else t for n, t in self.tensors.items()})

    def leaves(self) -> tuple[Attention, list[str]]:
        """The call on leaves that require gradients, and their names; strides are kept."""
        names = [n for n in DIFFERENTIABLE if n in self.tensors]
        fresh = {n: self.tensors[n].detach().requires_grad_() for n in names}
        return self.with_tensors(**fresh), names

    def row(self, b: int) -> Attention:
        """Row b alone."""

        def pick(name: str, t: Tensor) -> Tensor:
            whole = name in ("prefix_k", "prefix_v", "sinks") or (name.endswith("bias") and t.shape[0] == 1)
            return t if whole else t[b : b + 1]

        return replace(self, tensors={n: pick(n, t) for n, t in self.tensors.items()})


def attention(
    extents: list[tuple[int, int]],
    *,
    queries: int,
    keys: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    tokens: int = 40,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sinks: bool = False,
    bias: tuple[int, int, int] | None = None,
    strided: bool = False,
    **settings,
) -> Attention:
    """A random call; `settings` that are lists become int32 tensors a row.

    `strided` lays heads after tokens, and indices, sinks and biases apart.
    """
    gen = torch.Generator().manual_seed(seed)
    rows, (hq, hkv), (d, dv) = len(extents), heads, dims

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=gen).to(dtype)

    def by_head(*shape: int) -> Tensor:  # [B, H, tokens, d], as attention layers hand it over when strided
        b, h, n, e = shape
        return draw(b, n, h, e).transpose(1, 2) if strided else draw(b, h, n, e)

    def apart(x: Tensor) -> Tensor:  # with others between its numbers
        return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0] if strided else x

    tensors = {
        "q": by_head(rows, hq, queries, d),
        "k": by_head(rows, hkv, keys, d),
        "v": by_head(rows, hkv, keys, dv),
        "prefix_k": draw(tokens, hkv, d).transpose(0, 1) if strided else draw(hkv, tokens, d),
        "prefix_v": draw(tokens, hkv, dv).transpose(0, 1) if strided else draw(hkv, tokens, dv),
        "prefix_start": apart(torch.tensor([s for s, _ in extents], dtype=torch.int32)),
        "prefix_len": apart(torch.tensor([n for _, n in extents], dtype=torch.int32)),
    }
    if sinks:
        tensors["sinks"] = apart(draw(hq))
    if bias is not None:
        width = max((n for _, n in extents), default=0) + 2
        b, h, n = bias
        tensors["bias"], tensors["prefix_bias"] = apart(draw(b, h, n, keys)), apart(draw(b, h, n, width))
    for name in [n for n, value in settings.items() if isinstance(value, list)]:
        tensors[name] = apart(torch.tensor(settings.pop(name), dtype=torch.int32))
    return Attention(tensors, settings)


def results(call: Attention, op: Callable, seed: int = 1, lse: bool = True, **more) -> dict[str, Tensor]:
    """Outputs and gradients of a random function of them, by name."""
    call, names = call.leaves()
    gen = torch.Generator().manual_seed(seed)

    def weighted(x: Tensor) -> Tensor:
        return (x * torch.randn(x.shape, dtype=torch.float64, generator=gen).to(x)).sum()

    if lse:
        out, log = call(op, return_lse=True, **more)
        loss = weighted(out) + weighted(log.masked_fill(log == -INF, 0.0))
    else:
        out = call(op, **more)
        loss = weighted(out)
    grads = torch.autograd.grad(loss, [call.tensors[n] for n in names], allow_unused=True)
    found = {"out": out.detach()} | ({"lse": log.detach()} if lse else {})
    for name, grad in zip(names, grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(call.tensors[name]) if grad is None else grad
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Equal within `tolerance` of each tensor's largest entry (at least 1); no NaN."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        actual = got[name]
        assert not actual.isnan().any(), f"{name} holds NaN"
        finite = expected[expected.isfinite()].abs()
        scale = max([1.0, *finite.tolist()])
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}", check_dtype=False
        )


VARIANTS = ["reference", *([] if native.obstacle() else [f"cpu-{isa}" for isa in native.load().isas()])]


@contextmanager
def running(variant: str) -> Iterator[str]:
    """The name of the implementation of one of VARIANTS, while its instruction set is the one in use."""
    name, _, isa = variant.partition("-")
    if not isa:
        yield name
        return
    usual = native.load().isa()
    native.load().use_isa(isa)
    try:
        yield name
    finally:
        native.load().use_isa(usual)


def widest(impl: str) -> torch.dtype:
    """The most precise dtype that an implementation takes."""
    return torch.float64 if impl == "reference" else torch.float32


def doubled(args: Sequence) -> list:
    """Arguments with every floating point tensor in float64, for the oracle."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Bound on the relative error of a sum of so many products, each rounded once, and of the result's own rounding."""
    return (terms + 2) * torch.finfo(dtype).eps
