"""The CUDA kernels compiled for GPUs that are not here: no spills, registers for two blocks, the instructions meant."""

import csv

import cuda_compiled
import pytest
from cuda_compiled import DTYPES, RECORD, TARGETS, Compiled, compile_for, cuobjdump, known_targets, listings, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: set CUDA_HOME, or put it on the path")

_REGISTERS = 65536  # of a multiprocessor
_THREADS = 128


@pytest.fixture(scope="module", params=[(target, dtype) for target in TARGETS for dtype in DTYPES], ids="-".join)
def compiled(request, tmp_path_factory):
    target, dtype = request.param
    if target not in known_targets():
        pytest.skip(f"this nvcc has no {target}")
    return compile_for(target, dtype, tmp_path_factory.mktemp("cubin"))


def test_kernels_fit_into_registers(compiled):
    kernels, _ = compiled
    assert sorted((k.kernel, k.head_dim) for k in kernels) == [
        (kernel, dim) for kernel in ("decode", "merge") for dim in (64, 96, 128, 256)
    ]
    for k in kernels:
        assert (k.stack, k.spilled) == (0, 0), k
        assert 2 * _THREADS * -(-k.registers // 8) * 8 <= _REGISTERS, k
        assert k.kernel == "decode" or k.registers <= 64, k


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: install CUDA's, or triton, which has one")
def test_the_instructions_that_are_meant(compiled):
    kernels, code = compiled
    found = listings(code)
    assert len(found) == len(kernels)
    half = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32"}[kernels[0].dtype]
    for name, listing in found.items():
        used = set(listing)
        assert not {i for i in used if i.startswith(("LDL", "STL"))}, f"{name} uses local memory"
        if "merge" in name:
            continue
        assert {half, "LDSM.16.M88.4", "LDSM.16.MT88.4"} <= used, name
        copies = {i for i in used if i.startswith("LDGSTS")}
        assert copies and all("BYPASS" in i and "128" in i for i in copies), (name, copies)
        bulk = kernels[0].target in ("sm_90a", "sm_100")
        assert bulk == any(i.startswith("UBLKCP") for i in used), name


def test_the_record_is_of_these_kernels(compiled):
    """bench/results/cuda_aot.csv; other versions of nvcc may allot registers otherwise."""
    with RECORD.open() as file:
        rows = [Compiled(*r.values()) for r in csv.DictReader(file)]
    kernels, _ = compiled

    def key(k):
        return k.target, k.kernel, k.dtype, str(k.head_dim)

    assert {key(k) for k in kernels} <= {key(r) for r in rows}


def test_what_looks_for_tools_says_what_it_found(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_compiled.nvcc() is None
