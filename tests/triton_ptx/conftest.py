"""Triton kernels run as their PTX: in a process of their own, where no test has them interpreted."""

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from triton import JITFunction

    from fastprompt._triton.merge_states import merge_states_fwd_kernel

    if not isinstance(merge_states_fwd_kernel, JITFunction):
        pytest.fail("the kernels are interpreted in this process: run tests/triton_ptx by itself")
