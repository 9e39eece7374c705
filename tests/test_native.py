"""The native extension: instruction sets, threads, the GIL, and what is said where it cannot run."""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastprompt import native, ops
from fastprompt.errors import ArgumentError, ImplementationError

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("portable", "avx2", "avx512_bf16", "avx512")
built = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))


@pytest.fixture
def fresh(monkeypatch):
    """The extension as if nothing had asked for it yet."""
    native.load.cache_clear()
    native.obstacle.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.load.cache_clear()
    native.obstacle.cache_clear()
    if native.obstacle() is None:
        native.load().use_isa(native.load().isas()[-1])


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and sets it back."""
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


def work(seed: int) -> list[torch.Tensor]:
    """Results and gradients of all small ops on inputs of a size that is shared among threads."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    out_a, out_b, lse_a, lse_b = draw(4, 33, 3, 65), draw(4, 33, 3, 65), draw(4, 3, 33), draw(4, 3, 33)
    leaves = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b, draw(50, 65), draw(40, 65), draw(40))]
    *states, table, weight, bias = leaves
    start, length = torch.tensor([0, 9, 30, 9]), torch.tensor([9, 21, 0, 21])
    ids = torch.randint(50, (4, 20), generator=gen)
    out, lse = ops.merge_states(*states, impl="cpu")
    embedded = ops.embed_prompts(ids, table, weight, start, length, impl="cpu")
    logits = ops.grouped_linear(out.flatten(1, 2), weight, bias, start, length, impl="cpu")
    loss = lse.sum() + embedded.square().sum() + logits[logits.isfinite()].square().sum()
    return [x.detach() for x in (out, lse, embedded, logits, *torch.autograd.grad(loss, leaves))]


@built
def test_the_best_instruction_set_is_used_and_a_lesser_one_on_request(fresh):
    fresh.delenv("FASTPROMPT_CPU_ISA", raising=False)
    extension = native.load()
    assert extension.isas()[0] == "portable" and extension.isa() in extension.isas()
    for isa in extension.isas():
        native.load.cache_clear()
        fresh.setenv("FASTPROMPT_CPU_ISA", isa)
        assert native.load().isa() == isa


@built
def test_an_instruction_set_that_is_not_there_is_an_error(fresh):
    fresh.setenv("FASTPROMPT_CPU_ISA", "mmx")
    with pytest.raises(ArgumentError, match=r"FASTPROMPT_CPU_ISA is 'mmx', expected one of portable.*, or unset"):
        native.load()
    with pytest.raises(ArgumentError, match="FASTPROMPT_CPU_ISA"):
        native.obstacle()


@built
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_no_instruction_stands_outside_its_instruction_set():
    """A helper compiled for AVX-512 and shared by the linker would end the process on an older processor."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.load().__file__], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"^[0-9a-f]+ <(.*)>:$", listing, flags=re.MULTILINE)[1:]
    seen = set()
    for name, body in zip(functions[::2], functions[1::2], strict=True):
        isa = next((i for i in ISAS if f"{len(i)}{i}" in name), None)
        seen.add(isa)
        if isa in (None, "portable"):  # every instruction of AVX begins with v
            assert not re.search(r"\tv[a-z0-9]+ ", body), name
        elif isa == "avx2":
            assert "%zmm" not in body, name
        elif isa == "avx512":
            assert not re.search(r"\tv\w*bf16", body), name
    assert seen == ({None, *ISAS} if "x86-64" in listing[:200] else {None, "portable"})


@built
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_are_torchs(threads, count):
    threads(count)
    assert native.load().num_threads() == count


@built
def test_work_is_shared_among_torchs_threads(threads):
    x, lse = torch.randn(16, 256, 8, 64), torch.randn(16, 8, 256)
    shares = {}
    for count in (1, 2):
        threads(count)
        ops.merge_states(x, lse, x, lse, impl="cpu")  # the pool is there
        whole, own = time.process_time(), time.thread_time()
        for _ in range(20):
            ops.merge_states(x, lse, x, lse, impl="cpu")
        shares[count] = (time.thread_time() - own) / (time.process_time() - whole)
    assert shares[1] > 0.9 and shares[2] < 0.8


@built
def test_results_do_not_depend_on_the_number_of_threads(threads):
    want = work(0)
    for count in (2, 3):
        threads(count)
        for a, b in zip(work(0), want, strict=True):
            assert torch.equal(a, b)


@built
@pytest.mark.parametrize("count", [1, 2])
def test_eight_python_threads_at_once(threads, count):
    threads(count)
    seeds = [*range(8)] * 4
    want = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for seed, got in zip(seeds, pool.map(work, seeds), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want[seed], strict=True))


@built
def test_python_runs_while_a_kernel_does():
    x, lse = torch.randn(64, 512, 8, 64), torch.randn(64, 8, 512)
    out = torch.empty_like(x), torch.empty_like(lse)
    span = []

    def kernel() -> None:
        span.append(time.perf_counter())
        native.load().merge_states(*out, x, lse, x, lse)
        span.append(time.perf_counter())

    with ThreadPoolExecutor(1) as pool:
        done, ticks = pool.submit(kernel), []
        while not done.done():
            ticks.append(time.perf_counter())
            time.sleep(0.001)
    begin, end = span[0] + 0.2 * (span[1] - span[0]), span[1] - 0.2 * (span[1] - span[0])
    assert any(begin < tick < end for tick in ticks)


@built
def test_memory_does_not_grow():
    status = Path("/proc/self/statm")
    for _ in range(3):
        work(1)
    before = int(status.read_text().split()[1])
    for _ in range(300):
        work(1)
    assert (int(status.read_text().split()[1]) - before) * 4096 < 8 * 2**20


@built
def test_tensors_that_cannot_be_read_are_refused():
    extension, x = native.load(), torch.randn(1, 1, 1, 1)
    for wrong in (x.double(), x.int(), x[None], 3.0, [x]):
        with pytest.raises((TypeError, RuntimeError)):
            extension.merge_states(wrong, x, x, x, x, x)
    with pytest.raises((RuntimeError, BufferError, NotImplementedError)):
        extension.merge_states(x.to("meta"), x, x, x, x, x)


def run_native(compiler, program, sources, emulator=()):
    """Builds a program of tests/native with sources of csrc, and runs it."""
    command = [compiler, "-std=c++17", "-O1", "-pthread", "-Wno-psabi", "-DFASTPROMPT_ISA=portable"]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "native" / f"{program.name}.cpp")]
    subprocess.run([*command, *(str(ROOT / "csrc" / name) for name in sources), "-o", str(program)], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # sanitizers, of this processor
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, env=clean)
    assert (done.returncode, done.stderr) == (0, "")


ATTENTION = ("prefix_attention.cpp", "checks.cpp", "parallel.cpp", "cpu/prefix_attention.cpp")
ATTENTION += ("cpu/prefix_attention_backward.cpp", "plan.cpp")
EMULATED = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_parallel_units(tmp_path):
    run_native("g++", tmp_path / "test_parallel", ["parallel.cpp"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_exponentials(tmp_path):
    run_native("g++", tmp_path / "test_vec", [])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_portable_attention(tmp_path):
    run_native("g++", tmp_path / "test_attention", ATTENTION)


@pytest.mark.skipif(not all(map(shutil.which, EMULATED)), reason=f"{' and '.join(EMULATED)} are not installed")
def test_attention_on_aarch64(tmp_path):
    run_native(EMULATED[0], tmp_path / "test_attention", ATTENTION, [EMULATED[1], "-L", "/usr/aarch64-linux-gnu"])


def test_what_is_said_where_it_is_not_built(fresh):
    fresh.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert "fastprompt._native is not built" in native.obstacle()
    with pytest.raises(ImplementationError, match="C\\+\\+17 compiler"):
        native.load()


@built
def test_what_is_said_where_it_cannot_be_loaded(fresh):
    def broken(name):
        raise ImportError("undefined symbol: nothing")

    with fresh.context() as patch:
        patch.setattr(native.importlib, "import_module", broken)
        assert native.obstacle() == "fastprompt._native cannot be loaded: undefined symbol: nothing"
    native.obstacle.cache_clear()
    fresh.setattr(native.ctypes, "CDLL", lambda path: object())
    assert "does not fit fastprompt._native" in native.obstacle()
