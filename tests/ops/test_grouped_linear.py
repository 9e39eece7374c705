"""grouped_linear against its oracle and against one linear layer a row."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import INF, VARIANTS, assert_same, doubled, rounding, running, widest

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError

START, LENGTH = [0, 5, 0, 2, 9, 5], [3, 4, 3, 0, 1, 4]


def arguments(bias=True, tokens=(), dtype=torch.float64, rows=6, size=8):
    x = torch.randn(rows, *tokens, size, dtype=torch.float64).to(dtype)
    weight, c = torch.randn(11, size, dtype=torch.float64).to(dtype), torch.randn(11, dtype=torch.float64).to(dtype)
    start, length = (torch.tensor(v[:rows], dtype=torch.int32) for v in (START, LENGTH))
    return [x, weight, c if bias else None, start, length]


def found(op, args, **more):
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    y = op(*leaves, **more)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(
        (y.masked_fill(y == -INF, 0.0) * weight).sum(), [t for t in leaves[:3] if t is not None]
    )
    return {"y": y.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


def assert_equals_oracle(impl, args, terms, **more):
    got = found(partial(ops.grouped_linear, impl=impl), args, **more)
    assert_same(got, found(reference.grouped_linear, doubled(args), **more), rounding(widest(impl), terms))


@pytest.mark.parametrize("more", [{}, {"max_out": 7}])
@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_oracle(impl, bias, tokens, more):
    assert_equals_oracle(impl, arguments(bias, tokens, widest(impl)), 36, **more)


@pytest.mark.parametrize("size", [1, 3, 16, 71, 128, 1100])
def test_any_size(impl, size):
    assert_equals_oracle(impl, arguments(tokens=(13,), dtype=widest(impl), size=size), max(size, 6 * 13))


def test_wide_layers_of_few_rows_and_of_many(impl):
    dtype = widest(impl)
    weight, bias = torch.randn(331, 67, dtype=dtype), torch.randn(331, dtype=dtype)
    start, length = torch.tensor([0, 31, 0]), torch.tensor([300, 300, 300])  # two layers that share weight rows
    for tokens in (1, 41, 150):
        args = [torch.randn(3, tokens, 67, dtype=dtype), weight, bias, start, length]
        assert_equals_oracle(impl, args, 600, max_out=303)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=30)
@given(
    extents=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=7),
    tokens=st.integers(0, 45),
    size=st.integers(1, 70),
    more=st.integers(0, 3),
    bias=st.booleans(),
)
def test_any_shape(variant, extents, tokens, size, more, bias):
    dtype = widest(variant.partition("-")[0])
    start, length = (torch.tensor(column) for column in zip(*extents, strict=True))
    x, weight = torch.randn(len(extents), tokens, size, dtype=dtype), torch.randn(40, size, dtype=dtype)
    args = [x, weight, torch.randn(40, dtype=dtype) if bias else None, start, length]
    with running(variant) as impl:
        assert_equals_oracle(impl, args, max(size, 7 * 45), max_out=int(length.max()) + more)


def test_odd_strides(impl):
    x, weight, bias, start, length = arguments(tokens=(4,), dtype=widest(impl))
    spread = [
        x.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2],
        torch.cat([weight, weight], 1)[:, 3:11],
        bias,
        start.long(),
        torch.stack([length, length], 1)[:, 1],
    ]
    assert_equals_oracle(impl, spread, 36)


def test_dimensions_that_do_not_fold(impl):
    x, *rest = arguments(tokens=(2, 3), dtype=widest(impl))
    assert_equals_oracle(impl, [x.transpose(1, 2).contiguous().transpose(1, 2), *rest], 36)


def test_each_row_is_its_linear_layer(impl):
    x, weight, bias, start, length = arguments(dtype=widest(impl))
    y = ops.grouped_linear(x, weight, bias, start, length, impl=impl)
    for b, (s, n) in enumerate(zip(START, LENGTH, strict=True)):
        torch.testing.assert_close(y[b, :n], torch.nn.functional.linear(x[b], weight[s : s + n], bias[s : s + n]))
        assert (y[b, n:] == -INF).all()


def test_empty_batch(impl):
    args, op = arguments(rows=0, dtype=widest(impl)), partial(ops.grouped_linear, impl=impl)
    assert op(*args).shape == reference.grouped_linear(*args).shape == (0, 0)
    assert found(op, args, max_out=3)["d1"].eq(0).all()


@pytest.mark.parametrize("size", [8, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_error_of_plain_pytorch(impl, dtype, size):
    args = arguments(tokens=(5,), dtype=dtype, size=size)
    exact = found(reference.grouped_linear, doubled(args))

    def plain(x, weight, bias, start, length):
        rows = []
        for b, (s, n) in enumerate(zip(START, LENGTH, strict=True)):
            y = torch.nn.functional.linear(x[b], weight[s : s + n], bias[s : s + n])
            rows.append(torch.nn.functional.pad(y, (0, 4 - n), value=-INF))
        return torch.stack(rows)

    usual, got = found(plain, args), found(partial(ops.grouped_linear, impl=impl), args)
    for name, want in exact.items():
        real = want.isfinite()
        error, peer = ((r[name].double() - want)[real].abs().max() for r in (got, usual))
        assert error <= 2 * peer + torch.finfo(dtype).eps * want[real].abs().max()


def test_large_bfloat16_products():
    """From some size on torch does them, as it is faster."""
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(9000, 128).bfloat16()
    start, length = torch.zeros(64, dtype=torch.int32), torch.full((64,), 9000, dtype=torch.int32)
    got = found(ops.grouped_linear, [x, weight, None, start, length])
    assert_same(got, found(reference.grouped_linear, [x, weight, None, start, length]), rounding(torch.bfloat16, 2))


def test_gradients_are_equal_to_the_last_bit(impl):
    args, op = arguments(tokens=(7,), dtype=torch.float32), partial(ops.grouped_linear, impl=impl)
    first = found(op, args)
    for _ in range(3):
        assert all(torch.equal(g, first[n]) for n, g in found(op, args).items())


def test_only_what_is_wanted_gets_a_gradient(impl):
    x, weight, bias, start, length = arguments(dtype=widest(impl))
    for leaf in (x, weight, bias):
        y = ops.grouped_linear(x, weight, bias, start, length, impl=impl)
        assert not y.requires_grad
        leaf.requires_grad_()
        y = ops.grouped_linear(x, weight, bias, start, length, impl=impl)
        torch.autograd.grad(y[y.isfinite()].sum(), leaf)
        leaf.requires_grad_(False)


def test_gradcheck():
    x, weight, bias, start, length = arguments(tokens=(2,))

    def function(*leaves):
        y = ops.grouped_linear(*leaves, start, length)
        return y.masked_fill(y == -INF, 0.0)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, weight, bias)])


def test_opcheck_and_compile(impl):
    dtype = widest(impl)
    x, weight, bias, start, length = arguments(tokens=(2,), dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastprompt.grouped_linear.default, (*leaves, start, length, 5, impl))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.fastprompt.grouped_linear_backward.default,
        (torch.rand(6, 2, 5, dtype=dtype), *plain, start, length, [True, False, True], impl),
    )
    torch.compiler.reset()
    op = partial(ops.grouped_linear, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    args = [*leaves, start, length]
    assert_same(found(compiled, args, max_out=4), found(op, args, max_out=4), 0)


def test_bad_arguments_are_named(impl):
    x, weight, bias, start, length = arguments(dtype=widest(impl))
    for name, args, more in [
        ("x", (x[0], weight, bias, start, length), {}),
        ("weight", (x, weight[:, :3], bias, start, length), {}),
        ("bias", (x, weight, bias[:4], start, length), {}),
        ("start", (x, weight, bias, start.float(), length), {}),
        ("start and length", (x, weight, bias, start + 9, length), {}),
        ("start and length", (x, weight, bias, start, -length), {"max_out": 3}),
        ("length", (x, weight, bias, start, length[:2]), {}),
        ("max_out", (x, weight, bias, start, length), {"max_out": 2}),
    ]:
        with pytest.raises(ArgumentError, match=name):
            ops.grouped_linear(*args, **more, impl=impl)
