"""merge_states against its oracle and against attention over all keys at once."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import INF, VARIANTS, assert_same, attention, doubled, rounding, running, widest

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError


def states(dtype=torch.float64, strided=False, size=7):
    """Two states with parts, and pairs of parts, that saw nothing."""
    shape = (2, 5, 3, size)  # B, N, Hq, Dv
    outs = [torch.randn(*shape, dtype=torch.float64).to(dtype) for _ in range(2)]
    if strided:
        outs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in outs]
    lses = [torch.randn(2, 3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
    lses[0][0, 0], lses[1][0, :2], lses[1][1, 2, 1:3] = -INF, -INF, -INF
    return outs[0], lses[0], outs[1], lses[1]


def found(op, args):
    leaves = [x.detach().requires_grad_() for x in args]
    out, lse = op(*leaves)
    weight, weight_lse = torch.linspace(-1, 1, out.numel()), torch.linspace(-2, 1, lse.numel())
    loss = (out * weight.view(out.shape)).sum() + (lse.masked_fill(lse == -INF, 0.0) * weight_lse.view(lse.shape)).sum()
    grads = torch.autograd.grad(loss, leaves)
    names = ("out", "lse", "dout_a", "dlse_a", "dout_b", "dlse_b")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))


@pytest.mark.parametrize("size", [1, 7, 16, 67])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_the_oracle(impl, strided, size):
    args = states(widest(impl), strided, size)
    merge = partial(ops.merge_states, impl=impl)
    assert_same(found(merge, args), found(reference.merge_states, doubled(args)), rounding(widest(impl), size + 8))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30)
@given(shape=st.tuples(*[st.integers(0, 5)] * 3, st.integers(1, 70)), seed=st.integers(0, 9))
def test_any_shape(variant, shape, seed):
    gen = torch.Generator().manual_seed(seed)
    (rows, queries, heads, size), dtype = shape, widest(variant.partition("-")[0])
    outs = [torch.randn(*shape, generator=gen, dtype=dtype) for _ in range(2)]
    lses = [torch.randn(rows, heads, queries, generator=gen, dtype=dtype) for _ in range(2)]
    lses = [lse.masked_fill(lse > 1, -INF) for lse in lses]
    args = (outs[0], lses[0], outs[1], lses[1])
    with running(variant) as impl:
        got = found(partial(ops.merge_states, impl=impl), args)
    assert_same(got, found(reference.merge_states, doubled(args)), rounding(dtype, size + 8))


def test_parts_make_the_whole():
    call = attention([(3, 6), (9, 6)], queries=4, keys=4)
    whole = call(reference.prefix_attention, return_lse=True)
    own = call.with_tensors(prefix_len=torch.zeros(2, dtype=torch.int32))(reference.prefix_attention, return_lse=True)
    prefix = call.with_tensors(kv_len=torch.zeros(2, dtype=torch.int32))(reference.prefix_attention, return_lse=True)
    merged = ops.merge_states(*own, *prefix)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_part_that_saw_nothing_may_hold_anything(impl):
    args = states(widest(impl))
    poisoned = args[0].masked_fill((args[1] == -INF).transpose(1, 2)[..., None], float("nan"))
    got = found(partial(ops.merge_states, impl=impl), (poisoned, *args[1:]))
    assert_same(got, found(reference.merge_states, doubled(args)), rounding(widest(impl), 15))


def test_gradients_of_odd_strides(impl):
    a, la, b, lb = states(widest(impl))
    args = (a[:1].expand(2, -1, -1, -1), la, b[..., ::1], lb.transpose(1, 2).contiguous().transpose(1, 2))
    out, _ = ops.merge_states(*[x.requires_grad_() for x in args], impl=impl)
    want, _ = reference.merge_states(*[x.detach().double().requires_grad_() for x in args])
    grads = torch.autograd.grad(out.sum(), args)  # a gradient of ones is one number, expanded
    exact = [x.detach().double().requires_grad_() for x in args]
    wanted = torch.autograd.grad(reference.merge_states(*exact)[0].sum(), exact)
    assert_same(
        dict(enumerate([out.detach(), *grads])), dict(enumerate([want.detach(), *wanted])), rounding(widest(impl), 15)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(impl, dtype):
    args = states(dtype)
    exact = found(reference.merge_states, doubled(args))
    for name, got in found(partial(ops.merge_states, impl=impl), args).items():
        eps = torch.finfo(got.dtype if name.startswith(("out", "dout")) else dtype).eps
        finite = exact[name].isfinite()
        assert torch.equal(finite, got.isfinite())
        want = exact[name][finite]
        # every result sums at most Dv products of numbers rounded once
        assert (got.double()[finite] - want).abs().max() <= 8 * eps * max(1.0, want.abs().max())


def test_gradcheck():
    args = [x.requires_grad_() for x in states()]

    def function(*leaves):
        out, lse = ops.merge_states(*leaves)
        return out, lse.masked_fill(lse == -INF, 0.0)

    finite = [args[0], args[1].detach().masked_fill(args[1] == -INF, -3.0).requires_grad_(), args[2], args[3]]
    finite[3] = args[3].detach().masked_fill(args[3] == -INF, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(function, finite)


def test_opcheck_and_compile(impl):
    args = [x.requires_grad_() for x in states(widest(impl))]
    torch.library.opcheck(torch.ops.fastprompt.merge_states.default, (*args, impl))
    plain = [x.detach() for x in states(widest(impl), strided=True)]
    torch.library.opcheck(torch.ops.fastprompt.merge_states_backward.default, (plain[0], plain[1].exp(), *plain, impl))
    torch.compiler.reset()
    compiled = torch.compile(partial(ops.merge_states, impl=impl), fullgraph=True, backend="aot_eager")
    assert_same(found(compiled, args), found(partial(ops.merge_states, impl=impl), args), 0)


def test_compiles_where_the_implementation_is_chosen():
    args = states(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(ops.merge_states, fullgraph=True, backend="aot_eager")
    assert_same(found(compiled, args), found(ops.merge_states, args), 0)


def test_bad_arguments_are_named():
    a, la, b, lb = states()
    for name, args in {
        "out_a": (a[0], la, b, lb),
        "out_b": (a, la, b[:, :2], lb),
        "lse_a": (a, la.float(), b, lb),
        "lse_b": (a, la, b, lb.transpose(1, 2)),
    }.items():
        with pytest.raises(ArgumentError, match=name):
            ops.merge_states(*args)
