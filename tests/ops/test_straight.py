"""Calls that go straight to native kernels: refused in the words of calls that do not, and ops to whoever watches."""

from functools import partial

import pytest
import torch
from cpu_cases import NATIVE
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt import native, ops
from fastprompt.errors import ArgumentError

pytestmark = pytest.mark.skipif(not NATIVE, reason=str(native.obstacle()))


def index(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def calls():
    """A call of each op: itself, its tensors by name, and what else it takes."""
    draw = torch.randn
    states = {"out_a": draw(2, 5, 3, 4), "lse_a": draw(2, 3, 5), "out_b": draw(2, 5, 3, 4), "lse_b": draw(2, 3, 5)}
    prompts = {
        "input_ids": torch.randint(0, 9, (2, 6)), "weight": draw(9, 4), "prompts": draw(7, 4),
        "prompt_start": index(0, 3), "prompt_len": index(3, 2), "positions": index(0, 1, 2, 0, 2, 1).view(2, 3),
        "text_start": index(0, 1), "text_len": index(6, 5),
    }  # fmt: skip
    linear = {
        "x": draw(2, 3, 4), "weight": draw(9, 4), "bias": draw(9), "start": index(0, 5), "length": index(5, 4),
    }  # fmt: skip
    prefixes = {
        "prefix_k": draw(2, 7, 8), "prefix_v": draw(2, 7, 4), "prefix_start": index(0, 3), "prefix_len": index(3, 2),
        "sinks": draw(4),
    }  # fmt: skip
    attention = {"q": draw(2, 4, 3, 8), "k": draw(2, 2, 3, 8), "v": draw(2, 2, 3, 4), **prefixes}
    paged = {
        "q": draw(3, 4, 8), "k_cache": draw(5, 2, 2, 8), "v_cache": draw(5, 2, 2, 4), "q_start": index(0, 2, 3),
        "block_table": index(0, 1, 3, 2).view(2, 2), "kv_len": index(4, 3), **prefixes,
    }  # fmt: skip
    return {
        "merge_states": (ops.merge_states, states, {}),
        "embed_prompts": (ops.embed_prompts, prompts, {"out_len": 9}),
        "grouped_linear": (ops.grouped_linear, linear, {"max_out": 5}),
        "prefix_attention": (ops.prefix_attention, attention, {}),
        "paged_prefix_attention": (ops.paged_prefix_attention, paged, {}),
    }


WRONG = {
    "too few dimensions": lambda x: x[0],
    "too many dimensions": lambda x: x[None],
    "a short first dimension": lambda x: x[:-1],
    "a long first dimension": lambda x: torch.cat([x, x[:1]]),
    "a short last dimension": lambda x: x[..., :-1],
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "single precision": lambda x: x.float(),
    "half precision": lambda x: x.half(),
    "double precision": lambda x: x.double(),
    "whole numbers": lambda x: x.int(),
    "short numbers": lambda x: x.to(torch.int16),
    "no memory": lambda x: x.to("meta"),
}


class Seen(TorchDispatchMode):
    """Notes the names of fastprompt's ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastprompt":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def said(run):
    """What a call is refused with, None where it is not."""
    try:
        run()
    except ArgumentError as error:
        return str(error)


@pytest.mark.parametrize("name", calls())
def test_an_op_to_whoever_watches(name):
    op, tensors, more = calls()[name]
    run = partial(op, **tensors, **more, impl="cpu")
    with Seen() as seen:
        watched = run()
    assert seen.names == [f"fastprompt::{name}"]
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (watched, run())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", calls())
def test_refused_in_the_same_words(name):
    op, tensors, more = calls()[name]
    refused = 0
    for argument, (wrong, change) in ((a, w) for a in tensors for w in WRONG.items()):
        run = partial(op, **(tensors | {argument: change(tensors[argument])}), **more)
        with Seen():
            want = said(run)
        assert said(run) == want, (argument, wrong)
        refused += want is not None
    assert refused > 5 * len(tensors)
