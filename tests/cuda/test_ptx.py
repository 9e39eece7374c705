"""The CUDA decode kernels as nvcc compiles them, run without a GPU: inline assembly, layouts and addresses included.

The machine that runs them has been tried on kernels of another compiler, Triton's (tests/triton_ptx).
"""

import shutil

import pytest
import torch
from cuda_cases import batch, check, run, settings
from cuda_compiled import nvcc
from cuda_machine import Copies, Loads, chip
from cuda_ptx import PtxMachine, count
from ptx_machine import PtxError

pytestmark = pytest.mark.skipif(
    nvcc() is None or shutil.which("g++") is None, reason="no nvcc and g++: set CUDA_HOME, or put nvcc on the path"
)

PROMPT, OTHER, NONE = (3, 37), (45, 5), (0, 0)
ROWS = [PROMPT] * 4 + [OTHER] * 2 + [NONE, PROMPT]
OWN = [0, 1, 70, 16, 0, 33, 129, 5]
TOGETHER = [[0, 1, 2, 3, 7], [4, 5]]
LONG = pytest.mark.long


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def machine(request, host, tmp_path_factory):
    return PtxMachine.compile(host, request.param, tmp_path_factory.mktemp("ptx"))


def loads_of(machine):
    return (Loads.ASYNC, Loads.BULK) if machine.capability >= 90 else (Loads.ASYNC,)


SHAPES = [(64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16), (256, torch.float16)]
OTHERS = [(64, torch.float16), (96, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]


@pytest.mark.parametrize(("dim", "dtype"), [*SHAPES, *(pytest.param(*s, marks=LONG) for s in OTHERS)], ids=str)
def test_equals_the_oracle(machine, dim, dtype):
    """One setting of each kind, rows alone and together, both ways to load, copies as late as they may be."""
    for i, more in enumerate(settings(4, dtype)):
        loads = loads_of(machine)[i % len(loads_of(machine))]
        together = TOGETHER if i % 3 != 1 else None
        b = batch(ROWS, OWN, dim=dim, dtype=dtype, together=together, room=3, **more)
        check(machine, b, on=chip(machine.capability, 2), loads=loads, copies=Copies.LAZY)


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_groups_of_heads(machine, group):
    b = batch(ROWS, OWN, heads=(2 * group, 2), together=TOGETHER, size=3, heads_first=True)
    check(machine, b, on=chip(machine.capability, 2))


def test_long_rows_and_prefixes_in_parts(machine):
    prompt = (1, 700)
    b = batch(
        [prompt, prompt, NONE, (5, 3), prompt, prompt], [530, 1, 1000, 0, 256, 257], tokens=800, heads=(4, 1),
        together=[[0, 1, 4, 5]], sinks=torch.randn(4),
    )  # fmt: skip
    schedule = check(machine, b, on=chip(machine.capability, 20))
    assert schedule.alone_parts > 1 and schedule.shared_parts > 1


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=LONG) for n in (1, 2))])
def test_any_order_of_warps_and_copies_gives_the_same_bits(machine, seed):
    b = batch(ROWS, OWN, together=TOGETHER, e4m3=True)
    want, _ = run(machine, b, on=chip(machine.capability, 2), copies=Copies.EAGER)
    for loads in loads_of(machine):
        for copies in (Copies.EAGER, Copies.LAZY):
            got, _ = run(machine.in_order(seed), b, on=chip(machine.capability, 2), loads=loads, copies=copies)
            assert all(torch.equal(got[n].nan_to_num(7.0), want[n].nan_to_num(7.0)) for n in got)


def test_the_host_machine_and_the_compiled_kernel_agree(host, machine):
    """Bit for bit, but for what exp2 and log2 round."""
    b = batch(ROWS, OWN, together=TOGETHER, dtype=torch.float16)
    one, other = (run(m, b, on=chip(90, 2))[0] for m in (host, machine))
    torch.testing.assert_close(one["out"], other["out"], rtol=2**-10, atol=2**-12)
    torch.testing.assert_close(one["lse"], other["lse"], rtol=1e-6, atol=1e-6)


def test_what_reads_outside_is_found(machine):
    """The check itself is checked: a table entry of a row's keys that is no page of the cache."""
    b = batch(ROWS, OWN)
    b.tensors[3][2, 1] = 10**6
    with pytest.raises(PtxError, match=r"cp\.async.*(not allocated|outside)"):
        run(machine, b, on=chip(machine.capability, 2))


def test_each_byte_is_loaded_once_and_banks_do_not_conflict(machine):
    """Keys and values come once, by whole sectors; the rest, of plans and tables, is a few in a hundred."""
    alone = batch([(0, 256)] * 2, [512] * 2, heads=(8, 2), tokens=256)
    for loads in loads_of(machine):
        found = count(machine, alone, loads, 2)
        assert found["moved"] < 1.05 and found["rounds"] < 1.03 and found["instructions"] < 450, found
