"""Choosing an implementation, and saying why."""

import ast
import warnings
from pathlib import Path

import pytest
import torch

from fastprompt import dispatch, native
from fastprompt.errors import ArgumentError, ImplementationError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(monkeypatch):
    """A table of the reference alone to register into, gone after the test; what was said or chosen is forgotten."""
    own = {key: entry for key, entry in dispatch._table.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_table", own)
    monkeypatch.setattr(dispatch, "_best_known", {})
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)


def choose(op, impl, device=CPU, *dtypes):
    return dispatch.choose(op, impl, device, *(dtypes or (torch.float32,)))


def test_the_reference_is_chosen_where_nothing_better_is(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in dispatch.OPS:
            for device in ("cpu", "cuda", "meta"):
                assert choose(op, None, torch.device(device)) == "reference"


def test_the_best_that_runs_is_chosen(table):
    dispatch.register("merge_states", "cpu", "fastprompt._eager.merge_states")
    for _ in range(2):  # found out, then remembered
        assert choose("merge_states", None) == "cpu"
        assert choose("merge_states", None, CUDA) == "reference"
        assert choose("merge_states", "reference") == "reference"


def test_what_is_registered_later_is_seen(table):
    assert choose("merge_states", None) == "reference"
    dispatch.register("merge_states", "cpu", "fastprompt._eager.merge_states")
    assert choose("merge_states", None) == "cpu"


def test_kernels_get_no_float64(table):
    dispatch.register("embed_prompts", "cpu", "fastprompt._eager.embed_prompts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtypes in ((torch.float64, torch.float64), (torch.bfloat16, torch.float64)):
            assert choose("embed_prompts", None, CPU, *dtypes) == "reference"
        assert choose("embed_prompts", "cpu", CPU, torch.bfloat16, torch.float32) == "cpu"
    with pytest.raises(ImplementationError, match=r"got torch.float64, expected torch.float32, "):
        choose("embed_prompts", "cpu", CPU, torch.float16, torch.float64)
    with pytest.raises(ImplementationError, match="tensors are on cuda, expected cpu"):
        choose("embed_prompts", "cpu", CUDA)


@pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))
def test_native_kernels_run_on_the_cpu(monkeypatch):
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)
    for op in ("embed_prompts", "grouped_linear", "merge_states"):
        assert [choose(op, None, CPU, dtype) for dtype in (torch.float32, torch.float64)] == ["cpu", "reference"]
        assert callable(dispatch.kernels(op, "cpu").forward)


def test_a_fallback_from_what_should_run_is_said_once(table):
    dispatch.register("merge_states", "cpu", "fastprompt.nowhere", lambda: "its library is broken")
    dispatch.register("grouped_linear", "cpu", "fastprompt.nowhere", lambda: "its library is broken")
    with pytest.warns(RuntimeWarning, match=r"merge_states.*its library is broken"):
        assert choose("merge_states", None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("merge_states", None, CPU, torch.float16) == "reference"
        assert choose("grouped_linear", None) == "reference"  # for the same reason


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
def test_an_explicit_choice_raises_instead_of_falling_back(table, monkeypatch, impl):
    with pytest.raises(ImplementationError, match=f"'{impl}', which cannot run prefix_attention: "):
        choose("prefix_attention", impl)
    monkeypatch.setenv("FASTPROMPT_IMPL", impl)
    with pytest.raises(ImplementationError, match="FASTPROMPT_IMPL"):
        choose("prefix_attention", None)
    assert choose("prefix_attention", "reference") == "reference"


def test_an_unknown_name_lists_the_known_ones(table, monkeypatch):
    with pytest.raises(ArgumentError, match=r"'fast'.*reference, cpu, triton, flash, cuda"):
        choose("prefix_attention", "fast")
    monkeypatch.setenv("FASTPROMPT_IMPL", "quick")
    with pytest.raises(ArgumentError, match="FASTPROMPT_IMPL is 'quick'"):
        choose("prefix_attention", None)


def test_explain_lists_every_op_with_every_implementation(table):
    rows = dispatch.explain()
    assert [(r.op, r.impl) for r in rows] == [(op, impl) for op in dispatch.OPS for impl in dispatch.IMPLS]
    assert all(r.available == (r.impl == "reference") and r.reason for r in rows)


def test_every_registered_module_can_be_loaded():
    for op in dispatch.OPS:
        assert callable(dispatch.kernels(op, "reference").forward)


def test_heads_too_large_for_kernels_go_to_the_reference(table, monkeypatch):
    dispatch.register("prefix_attention", "triton", "fastprompt.nowhere")

    def chosen(impl, *sizes):
        found = dispatch.choose("prefix_attention", impl, CUDA, torch.float16)
        return dispatch.fitting_heads("prefix_attention", impl, found, *(torch.empty(1, n) for n in sizes))

    assert chosen(None, 256, 8) == "triton"
    with pytest.warns(RuntimeWarning, match=r"without their triton.*heads have 257 numbers, expected at most 256"):
        assert chosen(None, 8, 257) == "reference"
    assert chosen("reference", 999) == "reference"
    with pytest.raises(ImplementationError, match="'triton' cannot run prefix_attention: its heads have 300 numbers"):
        chosen("triton", 300)
    monkeypatch.setenv("FASTPROMPT_IMPL", "triton")
    with pytest.raises(ImplementationError, match="300 numbers"):
        chosen(None, 300)


def functions(module):
    """Parameters without a default of `forward` and `backward` in the file of a module, which need not be imported."""
    path = ROOT / "/".join(module.replace("fastprompt._triton", "kernels.triton").split("."))
    body = ast.parse(path.with_suffix(".py").read_text()).body
    found = [f for f in body if isinstance(f, ast.FunctionDef) and f.name in ("forward", "backward")]
    return {f.name: [ast.unparse(a) for a in f.args.args[: len(f.args.args) - len(f.args.defaults)]] for f in found}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_implementation_of_an_op_takes_the_same(op):
    wanted = functions(f"fastprompt._eager.{op}")
    for (name, impl), entry in dispatch._table.items():
        if name == op and impl != "reference":
            found = functions(entry.module)
            assert found["forward"] == wanted["forward"], impl
            assert impl in ("flash", "cuda") or found.get("backward") == wanted.get("backward"), impl
