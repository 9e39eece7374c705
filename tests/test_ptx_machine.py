"""The machine that runs PTX: arithmetic as PyTorch has it, and faults that are found rather than computed with."""

from __future__ import annotations

import struct

import pytest
import torch
from ptx_machine import Copies, Memory, PtxError, launch, parse

HEAD = """
.version 8.7
.target sm_90a
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1, .param .u32 kernel_param_2
)
.reqntid 128
{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<20>;
    .shared .align 16 .b8 room[2048];
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.u32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;            // the thread
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd1, %rd3;       // its element of the first tensor
    add.s64 %rd5, %rd2, %rd3;       // and of the second
    mov.u32 %r3, room;
    shl.b32 %r4, %r2, 2;
    add.s32 %r5, %r3, %r4;          // its place in shared memory
"""


def run(body, given, out, number=0, *, blocks=1, threads=128, **how):
    """Runs a body behind HEAD; `given` may be read, `out` be written."""
    (kernel,) = parse(HEAD + body + "\nret;\n}")
    memory = Memory(1 << 20)
    params = struct.pack("QQI", memory.place(given), memory.place(out, writable=True), number)
    launch(kernel, memory, params, blocks, threads, **how)
    memory.fetch()
    return out


def elementwise(opcode, *given):
    """What an instruction gives for each of 128 numbers."""
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd4+{512 * i}];\n" for i in range(len(given)))
    names = ", ".join(f"%r{10 + i}" for i in range(len(given)))
    body = f"{loads}{opcode} %r30, {names};\nst.global.b32 [%rd5], %r30;"
    return run(body, torch.cat(given), torch.zeros(128, dtype=given[0].dtype))


INTS = torch.cat([torch.tensor([0, 1, -1, 7, -7, 2**31 - 1, -(2**31)]), torch.arange(-60, 61) * 35791]).int()
OTHERS = torch.cat([torch.tensor([3, -3, 5, 2, -2, 7, 1]), torch.arange(121) % 37 + 1]).int()
FLOATS = torch.cat([torch.tensor([0.0, -0.0, float("nan"), float("inf"), -1e30]), torch.linspace(-9, 9, 123)])


@pytest.mark.parametrize(
    ("opcode", "want"),
    [
        ("add.s32", lambda a, b: a + b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: (a.long() * b >> 32).int()),
        ("div.s32", lambda a, b: torch.div(a, b, rounding_mode="trunc")),
        ("rem.s32", lambda a, b: torch.fmod(a, b)),
        ("max.s32", torch.maximum),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: torch.where(b < 32, a << b.clamp(max=31), 0)),
        ("shr.s32", lambda a, b: a >> b.clamp(max=31)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_whole_numbers(opcode, want):
    b = OTHERS.abs() if opcode.startswith("sh") else OTHERS
    assert torch.equal(elementwise(opcode, INTS, b), want(INTS, b))


@pytest.mark.parametrize(
    ("opcode", "want"),
    [
        ("sub.f32", lambda a, b: a - b),
        ("max.f32", torch.fmax),
        ("max.NaN.f32", torch.maximum),
        ("div.full.f32", lambda a, b: a / b),
        ("fma.rn.f32", lambda a, b, c: (a.double() * b + c).float()),
        ("ex2.approx.ftz.f32", torch.exp2),
        ("lg2.approx.f32", torch.log2),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_floats(opcode, want):
    count = want.__code__.co_argcount if hasattr(want, "__code__") else 2 if "max" in opcode else 1
    given = [FLOATS, FLOATS.flip(0) + 0.3, FLOATS.roll(5)][:count]
    torch.testing.assert_close(elementwise(opcode, *given), want(*given), rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_round_as_pytorch_does(name, dtype):
    exact = FLOATS * 3.21
    body = f"ld.global.b32 %f1, [%rd4];\ncvt.rn.{name}x2.f32 %r9, %f1, 0f3F800000;\nst.global.b32 [%rd5], %r9;"
    got = run(body, exact, torch.zeros(128, dtype=torch.int32)).view(dtype).view(128, 2)
    torch.testing.assert_close(got[:, 1], exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert (got[:, 0] == 1).all()


def test_comparisons_with_nan():
    a, b = FLOATS, FLOATS.roll(1)
    for how, want in {"lt": a < b, "ne": (a < b) | (a > b), "neu": a != b, "geu": ~(a < b), "eq": a == b}.items():
        body = "ld.global.b32 %f1, [%rd4];\nld.global.b32 %f2, [%rd4+512];\n"
        body += f"setp.{how}.f32 %p1, %f1, %f2;\nselp.b32 %r9, 1, 0, %p1;\nst.global.b32 [%rd5], %r9;"
        got = run(body, torch.cat([a, b]), torch.zeros(128, dtype=torch.int32))
        assert torch.equal(got.bool(), want), how


def test_bits_and_bytes():
    a, b = INTS, OTHERS * 0x01010101
    both = "ld.global.b32 %r8, [%rd4];\nld.global.b32 %r9, [%rd4+512];\n"
    given = torch.cat([a, b])

    def room():
        return torch.zeros(128, dtype=torch.int32)

    got = run(both + "bfe.s32 %r10, %r8, 4, 8;\nst.global.b32 [%rd5], %r10;", given, room())
    assert torch.equal(got, (a >> 4).to(torch.int8).int())
    got = run(both + "prmt.b32 %r10, %r8, %r9, 0x5410;\nst.global.b32 [%rd5], %r10;", given, room())
    assert torch.equal(got, (a & 0xFFFF) | b << 16)
    swap = "mov.b32 {%rs1, %rs2}, %r8;\nmov.b32 %r10, {%rs2, %rs1};\n"
    got = run(both + swap + "st.global.b32 [%rd5], %r10;", given, room())
    assert torch.equal(got, (a >> 16 & 0xFFFF) | a << 16)
    got = run(both + "shf.l.wrap.b32 %r10, %r8, %r9, 12;\nst.global.b32 [%rd5], %r10;", given, room())
    assert torch.equal(got, b << 12 | a >> 20 & 0xFFF)
    got = run(both + "shfl.sync.bfly.b32 %r10, %r8, 5, 31, -1;\nst.global.b32 [%rd5], %r10;", given, room())
    assert torch.equal(got, a[torch.arange(128) ^ 5])


DIVERGE = """
    and.b32 %r6, %r2, 3;
    mov.u32 %r7, 0;
$loop:
    add.s32 %r7, %r7, 10;
    add.s32 %r6, %r6, -1;
    setp.ge.s32 %p1, %r6, 0;
    @%p1 bra $loop;
    shfl.sync.idx.b32 %r8, %r7, 3, 31, -1;
    add.s32 %r9, %r7, %r8;
    st.global.b32 [%rd5], %r9;
"""


@pytest.mark.parametrize("seed", [None, 1])
def test_threads_that_went_apart_meet_again(seed):
    got = run(DIVERGE, torch.zeros(1), torch.zeros(128, dtype=torch.int32), seed=seed)
    assert torch.equal(got, (torch.arange(128) % 4 + 1).int() * 10 + 40)


EXCHANGE = """
    ld.global.b32 %r6, [%rd4];
    st.shared.b32 [%r5], %r6;
    {barrier}
    xor.b32 %r7, %r2, 64;
    shl.b32 %r7, %r7, 2;
    add.s32 %r7, %r3, %r7;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
"""


def test_a_missing_barrier_shows_when_warps_run_one_after_the_other():
    given = torch.arange(128).float()
    want = given[torch.arange(128) ^ 64]
    results = []
    for barrier in ("bar.sync 0;", ""):
        body = EXCHANGE.replace("{barrier}", barrier)
        results.append([torch.equal(run(body, given, torch.zeros(128), seed=s), want) for s in range(4)])
    assert results == [[True] * 4, [False] * 4]


COPY = """
    and.b32 %r6, %r2, 31;
    shl.b32 %r7, %r2, 4;
    add.s32 %r7, %r3, %r7;
    mul.wide.u32 %rd6, %r2, 16;
    add.s64 %rd7, %rd1, %rd6;
    cp.async.cg.shared.global [%r7], [%rd7], 16;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r8, [%r7+4];
    st.global.b32 [%rd5], %r8;
"""


def test_a_copy_that_nobody_waits_for_shows_when_copies_are_late():
    given = torch.arange(512).float()
    for wait, late in (("cp.async.wait_group 0;", True), ("cp.async.wait_group 1;", False)):
        body = COPY.replace("{wait}", wait)
        early = run(body, given, torch.zeros(128), when=Copies.EARLY)
        assert torch.equal(early, given[1::4])
        assert torch.equal(run(body, given, torch.zeros(128), when=Copies.LATE), early) == late


APART = """
    setp.lt.u32 %%p1, %%r2, 40;
    @%%p1 bra $there;
    %s
    ret;
$there:
    %s
"""


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.global.b32 %r6, [%rd4+64];", "not allocated.*thread 112, 16 threads"),
        ("ld.global.b32 %r6, [%rd4+100000000];", "outside"),
        ("ld.global.v2.b32 {%r6, %r7}, [%rd4];", "not a multiple of 8 bytes"),
        ("st.global.b32 [%rd4], %r2;", "not to be written"),
        ("ld.shared.b32 %r6, [%r5+1800];", "not allocated"),
        (APART % ("bar.warp.sync -1;", "bar.warp.sync -1;"), "all threads wait"),
        (APART % ("bar.sync 0;", "bar.sync 1;"), "all threads wait"),
        ("mbarrier.init.shared.b64 [%r3], 2;\nmbarrier.try_wait.parity.shared.b64 %p1, [%r3], 0;", "all threads wait"),
        ("mbarrier.try_wait.parity.shared.b64 %p1, [%r5], 0;", "no mbarrier"),
        ("vadd4.s32.s32.s32 %r6, %r7, %r8, %r9;", "not known"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_fail_at_is_an_error(body, what):
    with pytest.raises(PtxError, match=what):
        run(body, torch.zeros(128), torch.zeros(128))


def test_launches_are_checked():
    (kernel,) = parse(HEAD + "ret;\n}")
    with pytest.raises(PtxError, match="takes 20 bytes of parameters, 3 came"):
        launch(kernel, Memory(1 << 16), b"abc", 1, 32)
    with pytest.raises(PtxError, match="33 threads"):
        launch(kernel, Memory(1 << 16), bytes(20), 1, 33)
    with pytest.raises(PtxError, match="out of memory"):
        Memory(1 << 16).allocate(1 << 16)


def test_tensors_of_one_storage_stay_parts_of_one():
    memory, whole = Memory(1 << 16), torch.arange(64.0)
    assert memory.place(whole[16:]) - memory.place(whole) == 64
    assert memory.place(whole) % 256 == whole.data_ptr() % 256
