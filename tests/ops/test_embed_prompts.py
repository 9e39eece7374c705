"""embed_prompts against its oracle: padding on both sides, templates, gradients."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import VARIANTS, assert_same, doubled, rounding, running, widest

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError

START, LENGTH = [0, 3, 0, 9, 3], [3, 5, 3, 0, 5]


def arguments(dtype=torch.float64, columns=6, size=4):
    ids = torch.randint(0, 13, (5, columns))
    weight = torch.randn(13, size, dtype=torch.float64).to(dtype)
    prompts = torch.randn(10, size, dtype=torch.float64).to(dtype)
    return [ids, weight, prompts, *(torch.tensor(v, dtype=torch.int32) for v in (START, LENGTH))]


def found(op, args, **more):
    ids, weight, prompts, start, length = args
    weight, prompts = weight.detach().requires_grad_(), prompts.detach().requires_grad_()
    out = op(ids, weight, prompts, start, length, **more)
    factor = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    dweight, dprompts = torch.autograd.grad((out * factor).sum(), (weight, prompts), allow_unused=True)
    zero = torch.zeros_like
    return {
        "out": out.detach(),
        "dweight": zero(weight) if dweight is None else dweight,
        "dprompts": zero(prompts) if dprompts is None else dprompts,
    }


def assert_equals_oracle(impl, args, **more):
    """Sums of gradients have at most one term for each of the 5 * 15 places."""
    got = found(partial(ops.embed_prompts, impl=impl), args, **more)
    assert_same(got, found(reference.embed_prompts, doubled(args), **more), rounding(widest(impl), 75))


TEXTS = {
    "all": {},
    "left": {"text_start": torch.tensor([0, 2, 5, 6, -3], dtype=torch.int32)},
    "right": {"text_len": torch.tensor([6, 0, 3, 1, 5], dtype=torch.int32)},
    "both": {"text_start": torch.tensor([1, 2, 0, 6, 4]), "text_len": torch.tensor([6, 1, 3, 6, 5])},
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_oracle(impl, side, text):
    for scale, out_len, size in itertools.product((None, 2.5), (None, 15), (1, 21, 64)):
        args = arguments(widest(impl), size=size)
        more = {"padding_side": side, "scale": scale, "out_len": out_len, **TEXTS[text]}
        assert_equals_oracle(impl, args, **more)


@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_anywhere(impl, side):
    positions = torch.tensor([[2, 0, 5, 9, 9], [8, 4, 2, 6, 0], [6, 7, 8, 0, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    more = {"positions": positions.int(), "padding_side": side, "text_len": torch.tensor([6, 4, 6, 0, 2])}
    args = arguments(widest(impl))
    assert_equals_oracle(impl, args, **more)
    out = ops.embed_prompts(*args, **more, impl=impl)
    first = 0 if side == "right" else out.shape[1] - 9  # row 0 holds 3 virtual and 6 text tokens
    for index, token in ((2, 0), (0, 1), (5, 2)):
        assert torch.equal(out[0, first + index], args[2][token])
    assert torch.equal(out[0, first + 1], args[1][args[0][0, 0]])


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_template(variant, data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    start = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    length = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    end = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    positions = torch.zeros(rows, max(length, default=0), dtype=torch.int32)
    size = data.draw(st.integers(1, 40))
    for b in range(rows):
        places = data.draw(st.permutations(range(length[b] + end[b])))
        positions[b, : length[b]] = torch.tensor(places[: length[b]])
    ids, weight, prompts, _, _ = arguments(widest(variant.partition("-")[0]), columns, size)
    args = [
        ids[:rows],
        weight,
        prompts,
        torch.tensor(start, dtype=torch.int32),
        torch.tensor(length, dtype=torch.int32),
    ]
    more = {"positions": positions, "text_len": torch.tensor(end, dtype=torch.int32)}
    more["padding_side"] = data.draw(st.sampled_from(["left", "right"]))
    with running(variant) as impl:
        assert_equals_oracle(impl, args, **more)


def test_empty_batch(impl):
    ids, weight, prompts, start, length = arguments(widest(impl))
    none = (ids[:0], weight, prompts, start[:0], length[:0])
    op = partial(ops.embed_prompts, impl=impl)
    assert op(*none).shape == reference.embed_prompts(*none).shape == (0, 6, 4)
    assert op(ids[:, :0], weight, prompts, start, length * 0).shape == (5, 0, 4)
    assert op(ids, weight, prompts[:0], start, length * 0).shape == (5, 6, 4)


def test_padding_ids_are_never_looked_up(impl):
    args = arguments(widest(impl))
    args[0][:, 4:] = -100
    assert_equals_oracle(impl, args, text_len=torch.full((5,), 4, dtype=torch.int32))


def test_an_end_of_the_text_beyond_the_row_is_its_end(impl):
    assert_equals_oracle(impl, arguments(widest(impl)), text_len=torch.tensor([9, 6, 100, 2, 7]))


def test_odd_strides_and_wide_indices(impl):
    ids, weight, prompts, start, length = arguments(widest(impl))
    every_other = prompts.repeat_interleave(2, 0)[::2]
    wide = [ids.int().mT.contiguous().mT, weight.mT.contiguous().mT, every_other, start.long(), length.long()]
    assert_equals_oracle(impl, wide, text_start=torch.arange(10)[::2].int() % 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_of_another_precision(impl, dtype):
    args = arguments(dtype, size=19)
    args[2] = args[2].float()
    got = found(partial(ops.embed_prompts, impl=impl), args)
    assert got["out"].dtype == dtype and got["dprompts"].dtype == torch.float32
    exact = found(reference.embed_prompts, doubled(args))
    for name, want in exact.items():  # sums of at most 5 * 6 terms, each rounded once
        assert (got[name].double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * max(1, want.abs().max())


def test_prompts_of_float64_are_left_to_the_reference():
    args = arguments(torch.float32)
    args[2] = args[2].double()
    assert found(ops.embed_prompts, args)["dprompts"].dtype == torch.float64


def test_gradients_are_equal_to_the_last_bit(impl):
    args, op = arguments(torch.float32), partial(ops.embed_prompts, impl=impl)
    first = found(op, args)
    for _ in range(3):
        assert all(torch.equal(g, first[n]) for n, g in found(op, args).items())


def test_only_the_prompt_gets_a_gradient_from_frozen_embeddings(impl):
    ids, weight, prompts, start, length = arguments(widest(impl))
    prompts.requires_grad_()
    ops.embed_prompts(ids, weight, prompts, start, length, impl=impl).sum().backward()
    counts = torch.zeros(10)
    for s, n in zip(START, LENGTH, strict=True):
        counts[s : s + n] += 1
    assert weight.grad is None and torch.equal(prompts.grad[:, 0], counts.to(widest(impl)))


def test_gradcheck():
    ids, weight, prompts, start, length = arguments()
    leaves = [weight.requires_grad_(), prompts.requires_grad_()]
    assert torch.autograd.gradcheck(lambda w, p: ops.embed_prompts(ids, w, p, start, length, scale=1.5), leaves)


def test_opcheck_and_compile(impl):
    ids, weight, prompts, start, length = arguments(widest(impl))
    leaves = [weight.requires_grad_(), prompts.requires_grad_()]
    positions = torch.arange(5, dtype=torch.int32).expand(5, 5).contiguous()
    fixed = (start, length, positions, None, None, True, 12, 2.0)
    torch.library.opcheck(torch.ops.fastprompt.embed_prompts.default, (ids, *leaves, *fixed, impl))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.fastprompt.embed_prompts_backward.default,
        (torch.rand(5, 12, 4, dtype=widest(impl)), ids, *plain, *fixed, [False, True], impl),
    )
    torch.compiler.reset()
    op = partial(ops.embed_prompts, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    args = [ids, *leaves, start, length]
    assert_same(found(compiled, args, out_len=11), found(op, args, out_len=11), 0)


def test_bad_arguments_are_named(impl):
    ids, weight, prompts, start, length = arguments(widest(impl))
    twice = torch.zeros(5, 5, dtype=torch.int32)
    for name, args, more in [
        ("input_ids", (ids[0], weight, prompts, start, length), {}),
        ("input_ids", (ids.float(), weight, prompts, start, length), {}),
        ("prompts", (ids, weight, prompts[:, :2], start, length), {}),
        ("prompt_start", (ids, weight, prompts, start[:2], length), {}),
        ("prompt_start and prompt_len", (ids, weight, prompts, start + 6, length), {}),
        ("positions", (ids, weight, prompts, start, length), {"positions": twice}),
        ("positions", (ids, weight, prompts, start, length), {"positions": twice + 40}),
        (
            r"positions\[0, 1\] is -1",
            (ids, weight, prompts, start, length),
            {"positions": -torch.arange(5).expand(5, 5)},
        ),
        ("positions has 4 columns", (ids, weight, prompts, start, length), {"positions": twice[:, :4]}),
        ("input_ids holds 13", (ids + 13 - ids[0, 0], weight, prompts, start, length), {}),
        ("input_ids holds -1", (ids - 1 - ids[0, 0], weight, prompts, start, length), {}),
        ("out_len", (ids, weight, prompts, start, length), {"out_len": 7}),
        ("padding_side", (ids, weight, prompts, start, length), {"padding_side": "middle"}),
    ]:
        with pytest.raises(ArgumentError, match=name):
            ops.embed_prompts(*args, **more, impl=impl)
