"""embed_prompts against its oracle: padding on both sides, templates, gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_same

from fastprompt import ops, reference
from fastprompt.errors import ArgumentError

START, LENGTH = [0, 3, 0, 9, 3], [3, 5, 3, 0, 5]


def arguments(dtype=torch.float64, columns=6):
    ids = torch.randint(0, 13, (5, columns))
    weight = torch.randn(13, 4, dtype=torch.float64).to(dtype)
    prompts = torch.randn(10, 4, dtype=torch.float64).to(dtype)
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


TEXTS = {
    "all": {},
    "left": {"text_start": torch.tensor([0, 2, 5, 6, -3], dtype=torch.int32)},
    "right": {"text_len": torch.tensor([6, 0, 3, 1, 5], dtype=torch.int32)},
    "both": {"text_start": torch.tensor([1, 2, 0, 6, 4]), "text_len": torch.tensor([6, 1, 3, 6, 5])},
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_oracle(side, text):
    args = arguments()
    for scale, out_len in itertools.product((None, 2.5), (None, 15)):
        more = {"padding_side": side, "scale": scale, "out_len": out_len, **TEXTS[text]}
        assert_same(found(ops.embed_prompts, args, **more), found(reference.embed_prompts, args, **more), 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_anywhere(side):
    positions = torch.tensor([[2, 0, 5, 9, 9], [8, 4, 2, 6, 0], [6, 7, 8, 0, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    more = {"positions": positions.int(), "padding_side": side, "text_len": torch.tensor([6, 4, 6, 0, 2])}
    args = arguments()
    assert_same(found(ops.embed_prompts, args, **more), found(reference.embed_prompts, args, **more), 1e-12)
    out = ops.embed_prompts(*args, **more)
    first = 0 if side == "right" else out.shape[1] - 9  # row 0 holds 3 virtual and 6 text tokens
    for index, token in ((2, 0), (0, 1), (5, 2)):
        assert torch.equal(out[0, first + index], args[2][token])
    assert torch.equal(out[0, first + 1], args[1][args[0][0, 0]])


@settings(max_examples=50)
@given(data=st.data())
def test_any_template(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    start = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    length = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    end = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    positions = torch.zeros(rows, max(length, default=0), dtype=torch.int32)
    for b in range(rows):
        places = data.draw(st.permutations(range(length[b] + end[b])))
        positions[b, : length[b]] = torch.tensor(places[: length[b]])
    ids, weight, prompts, _, _ = arguments(columns=columns)
    args = [
        ids[:rows],
        weight,
        prompts,
        torch.tensor(start, dtype=torch.int32),
        torch.tensor(length, dtype=torch.int32),
    ]
    more = {"positions": positions, "text_len": torch.tensor(end, dtype=torch.int32)}
    more["padding_side"] = data.draw(st.sampled_from(["left", "right"]))
    assert_same(found(ops.embed_prompts, args, **more), found(reference.embed_prompts, args, **more), 1e-12)


def test_empty_batch():
    ids, weight, prompts, start, length = arguments()
    none = (ids[:0], weight, prompts, start[:0], length[:0])
    assert ops.embed_prompts(*none).shape == reference.embed_prompts(*none).shape == (0, 6, 4)
    assert ops.embed_prompts(ids[:, :0], weight, prompts, start, length * 0).shape == (5, 0, 4)


def test_padding_ids_are_never_looked_up():
    args = arguments()
    args[0][:, 4:] = -100
    more = {"text_len": torch.full((5,), 4, dtype=torch.int32)}
    assert_same(found(ops.embed_prompts, args, **more), found(reference.embed_prompts, args, **more), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_of_another_precision(dtype):
    args = arguments(dtype)
    args[2] = args[2].float()
    got = found(ops.embed_prompts, args)
    assert got["out"].dtype == dtype and got["dprompts"].dtype == torch.float32
    exact = found(reference.embed_prompts, [t.double() if t.is_floating_point() else t for t in args])
    for name, want in exact.items():  # sums of at most 5 * 6 terms, each rounded once
        assert (got[name].double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * max(1, want.abs().max())


def test_gradients_are_equal_to_the_last_bit():
    args = arguments(torch.float32)
    first = found(ops.embed_prompts, args)
    for _ in range(3):
        assert all(torch.equal(g, first[n]) for n, g in found(ops.embed_prompts, args).items())


def test_only_the_prompt_gets_a_gradient_from_frozen_embeddings():
    ids, weight, prompts, start, length = arguments()
    prompts.requires_grad_()
    ops.embed_prompts(ids, weight, prompts, start, length).sum().backward()
    counts = torch.zeros(10)
    for s, n in zip(START, LENGTH, strict=True):
        counts[s : s + n] += 1
    assert weight.grad is None and torch.equal(prompts.grad[:, 0], counts.double())


def test_gradcheck_opcheck_and_compile():
    ids, weight, prompts, start, length = arguments()
    leaves = [weight.requires_grad_(), prompts.requires_grad_()]
    assert torch.autograd.gradcheck(lambda w, p: ops.embed_prompts(ids, w, p, start, length, scale=1.5), leaves)
    positions = torch.arange(5, dtype=torch.int32).expand(5, 5).contiguous()
    fixed = (start, length, positions, None, None, True, 12, 2.0)
    torch.library.opcheck(torch.ops.fastprompt.embed_prompts.default, (ids, *leaves, *fixed, "reference"))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        torch.ops.fastprompt.embed_prompts_backward.default,
        (torch.rand(5, 12, 4, dtype=torch.float64), ids, *plain, *fixed, [False, True], "reference"),
    )
    torch.compiler.reset()
    compiled = torch.compile(ops.embed_prompts, fullgraph=True, backend="aot_eager")
    args = [ids, *leaves, start, length]
    assert_same(found(compiled, args, out_len=11), found(ops.embed_prompts, args, out_len=11), 1e-12)


def test_bad_arguments_are_named():
    ids, weight, prompts, start, length = arguments()
    twice = torch.zeros(5, 5, dtype=torch.int32)
    for name, args, more in [
        ("input_ids", (ids[0], weight, prompts, start, length), {}),
        ("input_ids", (ids.float(), weight, prompts, start, length), {}),
        ("prompts", (ids, weight, prompts[:, :2], start, length), {}),
        ("prompt_start", (ids, weight, prompts, start[:2], length), {}),
        ("prompt_start and prompt_len", (ids, weight, prompts, start + 6, length), {}),
        ("positions", (ids, weight, prompts, start, length), {"positions": twice}),
        ("positions", (ids, weight, prompts, start, length), {"positions": twice + 40}),
        ("out_len", (ids, weight, prompts, start, length), {"out_len": 7}),
        ("padding_side", (ids, weight, prompts, start, length), {"padding_side": "middle"}),
    ]:
        with pytest.raises(ArgumentError, match=name):
            ops.embed_prompts(*args, **more)
