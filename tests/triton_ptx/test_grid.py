"""gpu-check's calls on what Triton compiles, bfloat16 and wgmma included, run without a GPU."""

import csv

import pytest

from bench.gpu_check.grid import GRID

QUICK = {  # calls of `make test-triton`; `make test-full` has all
    ("sm_90", "bf16"): (
        "prefix_attention causal", "prefix_attention softcap, sinks, biases", "prefix_attention no own keys",
        "paged_prefix_attention ragged", "paged_prefix_attention decode, cut into parts",
        "paged_prefix_attention decode, window", "embed_prompts anywhere", "merge_states", "grouped_linear odd size",
    ),
    ("sm_80", "bf16"): ("prefix_attention odd head sizes", "paged_prefix_attention one query"),
    ("sm_90", "fp16"): ("grouped_linear even size",),
    ("sm_90", "fp32"): ("prefix_attention no own keys",),
}  # fmt: skip
COMPILED = (("sm_90", "bf16"), ("sm_90", "fp16"), ("sm_90", "fp32"), ("sm_80", "bf16"))  # as triton_ptx.grid has them
CALLS = [
    pytest.param(target, dtype, call, marks=() if call in QUICK.get((target, dtype), ()) else pytest.mark.long)
    for target, dtype in COMPILED
    for call in GRID
]


@pytest.mark.parametrize(("target", "dtype", "call"), CALLS)
def test_errors_are_within_their_bounds(target, dtype, call):
    from triton_ptx.grid import check

    found = check(target, dtype, call)
    assert 0 <= float(found["share"]) <= 1 and call.split()[0] in found["kernels"]


SLOW = pytest.param("prefix_attention softcap, sinks, biases", marks=pytest.mark.long)


@pytest.mark.parametrize("call", ["paged_prefix_attention decode, window", SLOW])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_warps_may_run_in_any_order_and_copies_early(call, seed):
    """Within the same bounds, as bits do not change."""
    from ptx_machine import Copies
    from triton_ptx.grid import check

    assert check("sm_90", "bf16", call, Copies.EARLY, seed) == check("sm_90", "bf16", call)


def test_the_record_has_all_calls():
    from triton_ptx.grid import RECORD

    with RECORD.open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["target"], line["dtype"], line["call"]) for line in lines] == [p.values for p in CALLS]
    assert all(0 <= float(line["share"]) <= 1 for line in lines)
