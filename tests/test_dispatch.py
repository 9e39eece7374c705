"""Choosing an implementation, and saying why."""

import warnings

import pytest

from fastprompt import dispatch
from fastprompt.errors import ArgumentError, ImplementationError


@pytest.fixture
def table(monkeypatch):
    """A table to register into, gone after the test, with the notices of earlier tests forgotten."""
    monkeypatch.setattr(dispatch, "_table", dict(dispatch._table))
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)
    dispatch._say_once.cache_clear()


def test_the_reference_is_chosen_where_nothing_better_is(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in dispatch.OPS:
            for device in ("cpu", "cuda", "meta"):
                assert dispatch.choose(op, None, device) == "reference"


def test_the_best_that_runs_is_chosen(table):
    dispatch.register("merge_states", "cpu", "fastprompt._eager.merge_states")
    assert dispatch.choose("merge_states", None, "cpu") == "cpu"
    assert dispatch.choose("merge_states", None, "cuda") == "reference"
    assert dispatch.choose("merge_states", "reference", "cpu") == "reference"


def test_a_fallback_from_what_should_run_is_said_once(table):
    dispatch.register("merge_states", "cpu", "fastprompt.nowhere", lambda: "its library is broken")
    with pytest.warns(RuntimeWarning, match=r"merge_states.*its library is broken"):
        assert dispatch.choose("merge_states", None, "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("merge_states", None, "cpu") == "reference"


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
def test_an_explicit_choice_raises_instead_of_falling_back(table, monkeypatch, impl):
    with pytest.raises(ImplementationError, match=f"'{impl}'.*not installed"):
        dispatch.choose("prefix_attention", impl, "cpu")
    monkeypatch.setenv("FASTPROMPT_IMPL", impl)
    with pytest.raises(ImplementationError, match="FASTPROMPT_IMPL"):
        dispatch.choose("prefix_attention", None, "cpu")
    assert dispatch.choose("prefix_attention", "reference", "cpu") == "reference"


def test_an_unknown_name_lists_the_known_ones(table, monkeypatch):
    with pytest.raises(ArgumentError, match=r"'fast'.*reference, cpu, triton, cuda"):
        dispatch.choose("prefix_attention", "fast", "cpu")
    monkeypatch.setenv("FASTPROMPT_IMPL", "quick")
    with pytest.raises(ArgumentError, match="FASTPROMPT_IMPL is 'quick'"):
        dispatch.choose("prefix_attention", None, "cpu")


def test_explain_lists_every_op_with_every_implementation(table):
    rows = dispatch.explain()
    assert [(r.op, r.impl) for r in rows] == [(op, impl) for op in dispatch.OPS for impl in dispatch.IMPLS]
    assert all(r.available == (r.impl == "reference") and r.reason for r in rows)


def test_every_registered_module_can_be_loaded():
    for op in dispatch.OPS:
        assert callable(dispatch.kernels(op, "reference").forward)
