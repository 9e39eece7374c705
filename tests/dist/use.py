"""Runs one op of each kind, forward and backward; the argument is the implementation that must do it.

Runs in a fresh environment, away from the source tree (see check.py).
"""

import sys
import warnings

import torch

import fastprompt
from fastprompt import dispatch, native, ops
from fastprompt.errors import ImplementationError
from fastprompt.plan import BatchPlan

impl = sys.argv[1]
assert fastprompt.__file__.startswith(sys.prefix), fastprompt.__file__


def results(impl: str | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    table, bias = torch.randn(9, 8, requires_grad=True), torch.randn(9)
    start, length = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    arena = table.expand(2, 9, 8)
    plan = BatchPlan.build(start, length)
    out, lse = ops.prefix_attention(q, k, v, arena, arena, start, length, plan=plan, impl=impl, return_lse=True)
    merged, _ = ops.merge_states(out, lse, out.flip(0), lse.flip(0), impl=impl)
    embedded = ops.embed_prompts(torch.arange(6).view(2, 3), table, table, start, length, impl=impl)
    logits = ops.grouped_linear(merged.flatten(2)[..., :8], table, bias, start, length, impl=impl)
    loss = merged.sum() + embedded.square().sum() + logits[logits.isfinite()].sum()
    return [out, merged, embedded, logits, *torch.autograd.grad(loss, table)]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    chosen = results(None)
said = [str(w.message) for w in caught if "fastprompt" in str(w.message)]
for got, want in zip(chosen, results("reference"), strict=True):
    torch.testing.assert_close(got, want)
assert dispatch.choose("merge_states", None, torch.device("cpu"), torch.float32) == impl

if impl == "cpu":
    assert not said, said
    for got, want in zip(results("cpu"), chosen, strict=True):
        assert torch.equal(got, want)
    print(f"native kernels for {native.load().isa()}")
else:
    assert len(said) == 1 and "not built" in said[0] and "C++17 compiler" in said[0], said
    refused = None
    try:
        results("cpu")
    except ImplementationError as error:
        refused = str(error)
    assert refused and "not built" in refused, refused
    print("pure Python, said once")
