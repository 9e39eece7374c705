"""grouped_linear against its oracle and against one linear layer a row."""

import pytest
import torch
from op_cases import INF, assert_same

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError

START, LENGTH = [0, 5, 0, 2, 9, 5], [3, 4, 3, 0, 1, 4]


def arguments(bias=True, tokens=(), dtype=torch.float64, rows=6):
    x = torch.randn(rows, *tokens, 8, dtype=torch.float64).to(dtype)
    weight, c = torch.randn(11, 8, dtype=torch.float64).to(dtype), torch.randn(11, dtype=torch.float64).to(dtype)
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


@pytest.mark.parametrize("more", [{}, {"max_out": 7}])
@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_oracle(bias, tokens, more):
    args = arguments(bias, tokens)
    assert_same(found(ops.grouped_linear, args, **more), found(reference.grouped_linear, args, **more), 1e-12)


def test_each_row_is_its_linear_layer():
    x, weight, bias, start, length = arguments()
    y = ops.grouped_linear(x, weight, bias, start, length)
    for b, (s, n) in enumerate(zip(START, LENGTH, strict=True)):
        torch.testing.assert_close(y[b, :n], torch.nn.functional.linear(x[b], weight[s : s + n], bias[s : s + n]))
        assert (y[b, n:] == -INF).all()


def test_empty_batch():
    args = arguments(rows=0)
    assert ops.grouped_linear(*args).shape == reference.grouped_linear(*args).shape == (0, 0)
    assert found(ops.grouped_linear, args, max_out=3)["d1"].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_error_of_plain_pytorch(dtype):
    args = arguments(tokens=(5,), dtype=dtype)
    exact = found(reference.grouped_linear, [t.double() if t.is_floating_point() else t for t in args])

    def plain(x, weight, bias, start, length):
        rows = []
        for b, (s, n) in enumerate(zip(START, LENGTH, strict=True)):
            y = torch.nn.functional.linear(x[b], weight[s : s + n], bias[s : s + n])
            rows.append(torch.nn.functional.pad(y, (0, 4 - n), value=-INF))
        return torch.stack(rows)

    usual, got = found(plain, args), found(ops.grouped_linear, args)
    for name, want in exact.items():
        real = want.isfinite()
        error, peer = ((r[name].double() - want)[real].abs().max() for r in (got, usual))
        assert error <= 2 * peer + torch.finfo(dtype).eps * want[real].abs().max()


def test_gradients_are_equal_to_the_last_bit():
    args = arguments(tokens=(7,), dtype=torch.float32)
    first = found(ops.grouped_linear, args)
    for _ in range(3):
        assert all(torch.equal(g, first[n]) for n, g in found(ops.grouped_linear, args).items())


def test_gradcheck_opcheck_and_compile():
    x, weight, bias, start, length = arguments(tokens=(2,))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves):
        y = ops.grouped_linear(*leaves, start, length)
        return y.masked_fill(y == -INF, 0.0)

    assert torch.autograd.gradcheck(function, leaves)
    torch.library.opcheck(torch.ops.fastprompt.grouped_linear.default, (*leaves, start, length, 5, "reference"))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.fastprompt.grouped_linear_backward.default,
        (torch.rand(6, 2, 5, dtype=torch.float64), *plain, start, length, [True, False, True], "reference"),
    )
    torch.compiler.reset()
    compiled = torch.compile(ops.grouped_linear, fullgraph=True, backend="aot_eager")
    args = [*leaves, start, length]
    assert_same(found(compiled, args, max_out=4), found(ops.grouped_linear, args, max_out=4), 1e-12)


def test_bad_arguments_are_named():
    x, weight, bias, start, length = arguments()
    for name, args, more in [
        ("x", (x[0], weight, bias, start, length), {}),
        ("weight", (x, weight[:, :3], bias, start, length), {}),
        ("bias", (x, weight, bias[:4], start, length), {}),
        ("start", (x, weight, bias, start.float(), length), {}),
        ("start and length", (x, weight, bias, start + 9, length), {}),
        ("length", (x, weight, bias, start, length[:2]), {}),
        ("max_out", (x, weight, bias, start, length), {"max_out": 2}),
    ]:
        with pytest.raises(ArgumentError, match=name):
            ops.grouped_linear(*args, **more)
