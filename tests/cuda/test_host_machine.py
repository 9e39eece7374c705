"""That the tests on the host machine notice mistakes: each of these is made in a copy of the kernels, and found out."""

import shutil

import pytest
from cuda_cases import batch, run
from cuda_machine import Copies, Loads, Machine

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host"),
]

PROMPT, OTHER = (3, 300), (445, 29)  # five tiles: the last is in the first stage, where warps' states go
ROWS = [PROMPT] * 18 + [OTHER] * 3
SYNC = "solo ? warp_sync() : block_sync();"
MISTAKES = {
    "no barrier before a stage is loaded again": ("attend.cuh", SYNC, "if (solo) warp_sync();"),
    "warps' states before all have read the ring": ("attend.cuh", "  block_sync();\n  exchange.put", "  exchange.put"),
    "results before all warps' states": ("attend.cuh", "exchange.put(state);\n  block_sync();", "exchange.put(state);"),
    "the ring in use before results are read": ("attend.cuh", "ring.fence();\n  block_sync();", "ring.fence();"),
    "a group of copies too few is waited for": ("loads.cuh", "== 4) wait_groups<2>", "== 4) wait_groups<3>"),
    "a barrier's phase forgotten": ("loads.cuh", "parity_ ^= 1", "parity_ = 0"),
    "bytes of narrow rows counted as wide": ("loads.cuh", "(2 * kLanes - count_bits(ballot(narrow)))", "(2 * kLanes)"),
    "widened before all have read": ("loads.cuh", "      warp_sync();\n", ""),
    "keys that are not there": ("softmax.cuh", "key < end ? x : no_weight()", "x"),
    "sums not put on the scale of a higher logit": ("softmax.cuh", "sum[h] *= shrink[h];", ""),
    "a copy of a row left out": ("attend.cuh", "mine < copies ? warps : 0", "mine < copies ? warps - 1 : 0"),
    "the last part left out": ("merge.cuh", "i < parts; ++i) {", "i < parts - 1; ++i) {"),
}  # fmt: skip


def wrong(machine: Machine) -> bool:
    """Whether any order of warps and copies shows a result that is not the usual one, or a fault."""
    own = [i % 6 * 45 + 1 for i in range(len(ROWS))]
    b = batch(ROWS, own, tokens=480, together=[list(range(9)), list(range(9, 18))], e4m3=True)
    exact = b.oracle()
    for loads in (Loads.ASYNC, Loads.BULK):
        for copies in Copies:
            for seed in range(2):
                try:
                    got, _ = run(machine, b, loads=loads, copies=copies, seed=seed)
                except AssertionError:
                    return True
                if not all((got[n].double() - exact[n]).abs().max() < 0.02 for n in got):
                    return True
    return False


def test_without_a_mistake_nothing_is_found(tmp_path):
    assert not wrong(Machine.build(tmp_path))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found(tmp_path, mistake):
    assert wrong(Machine.build(tmp_path, mistake))
