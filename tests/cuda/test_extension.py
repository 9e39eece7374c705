"""The op by the CUDA kernel from end to end: fastprompt/_cuda, the bindings and the kernels, on the host machine."""

import sys
from dataclasses import replace

import cuda_extension
import numpy
import pytest
import torch
from serving.test_graphs import Again
from serving_cases import backbone, greedy, run, texts, tokens

import fastprompt as fp
from bench.gpu_check.calls import Right
from bench.gpu_check.grid import DECODING, GRID
from fastprompt import dispatch, native, ops
from fastprompt.arguments import PagedPrefixAttention
from fastprompt.errors import ImplementationError
from fastprompt.model import PromptedModel
from fastprompt.plan import BatchPlan
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.graphs import GraphRunner
from fastprompt.serving.runner import PackedRunner

OP = "paged_prefix_attention"
MODULE = f"fastprompt._cuda.{OP}"
SHARED = "paged_prefix_attention decode, shared prefixes"
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return cuda_extension.build(tmp_path_factory.mktemp("extension"))


@pytest.fixture(autouse=True)
def cuda(extension, monkeypatch):
    """impl "cuda" runs on tensors in main memory, and is the best there."""

    def forget():
        sys.modules.pop(MODULE, None)
        dispatch._load.cache_clear()

    monkeypatch.setattr(native, "load_cuda", lambda: extension)
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setitem(dispatch._table, (OP, "cuda"), dispatch.Implementation(MODULE, lambda: None))
    monkeypatch.setattr(dispatch, "_best_known", {})
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODING)
def test_equals_the_oracle(name, dtype):
    call = GRID[name](dtype)
    got = call.ours("cuda")
    assert set(Right.of(call).errors(got)) == {"out", "lse"}
    assert all(torch.equal(got[n], x) for n, x in call.ours("cuda").items())


def spread(x):
    """The same numbers with other strides: heads before tokens, rows apart, slack that holds NaN."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan if x.is_floating_point() else 9**9, dtype=x.dtype)
    if x.dim() > 2:
        room = room.transpose(-3, -2).contiguous().transpose(-3, -2)
    view = room[..., 8:-8] if x.is_floating_point() else room[..., : x.shape[-1]]
    return view.copy_(x)


@pytest.mark.parametrize("name", [SHARED, "paged_prefix_attention one query"])
def test_any_strides_of_whole_vectors(name):
    call = GRID[name](torch.float16)
    tensors = {n: spread(x) if x.dim() > 1 else x.long() for n, x in call.tensors.items()}
    assert not any(x.is_contiguous() for x in tensors.values() if x.dim() > 1)
    moved = replace(call, tensors=tensors)
    assert all(torch.equal(x, moved.ours("cuda")[n]) for n, x in call.ours("cuda").items())


def test_one_place_serves_every_plan_of_its_capacity():
    """As in a captured graph: the tensors stay where they are, rows read other prompts, or alone."""
    call = GRID[SHARED](torch.bfloat16)
    held, settings = call.plan()["plan"], {"capacity_rows": 23, "queries": [1] * 23}
    extents = list(zip(*(call.tensors[n].tolist() for n in ("prefix_start", "prefix_len")), strict=True))
    for order in (extents[::-1], [(40 * i, 33) for i in range(23)], [(0, 0)] * 23, [(10, 900)] * 23):
        for name, values in zip(("prefix_start", "prefix_len"), zip(*order, strict=True), strict=True):
            call.tensors[name].copy_(torch.tensor(values))
        held.copy_(BatchPlan.build(*zip(*order, strict=True), **settings))
        out, lse = ops.paged_prefix_attention(**call.tensors, plan=held, return_lse=True, impl="cuda")
        Right.of(call).errors({"out": out, "lse": lse})


def test_e4m3_prefixes_with_a_scale_for_each_head():
    """By the launcher alone, as the op takes none; with powers of two nothing is rounded before the products."""
    call = GRID[SHARED](torch.bfloat16)
    scales = torch.tensor([[2.0**-6, 2.0**-7, 2.0**-5, 2.0**-6], [2.0**-5, 2.0**-6, 2.0**-7, 2.0**-7]])
    names = ("prefix_k", "prefix_v")
    narrow = {
        n: (call.tensors[n] / s[:, None, None]).to(torch.float8_e4m3fn) for n, s in zip(names, scales, strict=True)
    }
    wide = {n: (x.float() * s[:, None, None]).bfloat16() for (n, x), s in zip(narrow.items(), scales, strict=True)}
    forward = dispatch.kernels(OP, "cuda").forward
    more, sharing = (None, 128**-0.5, None, None), call.plan()["plan"].sharing
    given = PagedPrefixAttention(*(dict(call.tensors) | narrow).values(), *more)
    out, lse = forward(given, None, sharing, True, tuple(scales))
    Right.of(replace(call, tensors=dict(call.tensors) | wide)).errors({"out": out, "lse": lse})
    with pytest.raises(ValueError, match="prefix_v_scale is not contiguous float32"):
        forward(given, None, sharing, True, (scales[0], scales[1, :3]))
    with pytest.raises(ValueError, match=r"prefix_k_scale is not .* e4m3 prefixes"):
        forward(PagedPrefixAttention(*call.tensors.values(), *more), None, sharing, True, tuple(scales))


def test_an_arena_without_tokens():
    call = GRID[SHARED](torch.bfloat16)
    tensors = {n: x[:, :0] if n in ("prefix_k", "prefix_v") else x for n, x in call.tensors.items()}
    tensors |= {n: torch.zeros_like(tensors[n]) for n in ("prefix_start", "prefix_len")}
    empty = replace(call, tensors=tensors)
    Right.of(empty).errors(empty.ours("cuda"))


def test_compiled_calls_have_the_same_bits(monkeypatch):
    """Where nothing is asked for, as a model calls it."""
    call = GRID[SHARED](torch.bfloat16)
    plan = call.plan()["plan"]
    torch.compiler.reset()
    function = torch.compile(
        lambda **tensors: ops.paged_prefix_attention(**tensors, plan=plan), fullgraph=True, backend="aot_eager"
    )
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda",))
    assert torch.equal(function(**call.tensors), ops.paged_prefix_attention(**call.tensors, plan=plan))


def test_opcheck():
    t = GRID["paged_prefix_attention decode, small heads"](torch.float16).tensors
    for need_lse in (True, False):
        given = (*t.values(), None, 0.3, 40, None, None, None, need_lse, "cuda")
        torch.library.opcheck(torch.ops.fastprompt.paged_prefix_attention.default, given)


def test_what_the_kernel_refuses_is_an_error_of_ours(extension):
    call = GRID[SHARED](torch.float16)
    q = call.tensors["q"]
    elsewhere = torch.from_numpy(numpy.empty(q.numel() + 1, dtype=numpy.float16)[1:])  # begins between vectors
    call.tensors["q"] = elsewhere.view_as(q).copy_(q)
    with pytest.raises(ImplementationError, match=r"'cuda'.*(multiples|alignment)"):
        call.ours("cuda")
    arguments = [torch.zeros(1, 1, 64).half()] * 5 + [torch.zeros(1, 1).int(), torch.zeros(2).int()]
    with pytest.raises(ValueError, match="kv_len is not contiguous int32"):
        extension.Decode(*arguments, torch.zeros(1).long(), *[None] * 7, 1.0, 0, 0.0, 0, None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    model = PromptedModel(backbone(head_dim=64))
    for i, length in enumerate((30, 7, 1)):
        model.add_prompt(f"p{i}", fp.PrefixTuning(num_virtual_tokens=length, init_std=1.0), seed=i)
        model.save_prompt(f"p{i}", path / f"p{i}")
    return path


def answers(folder, recorded):
    """What an engine in half precision answers, decoding through the buffers of recordings or step by step."""
    options = EngineOptions(block_size=4, max_model_len=128, device_bytes=2**22)
    made = build_engine(backbone(head_dim=64).to(torch.float16), folder, options)
    if recorded:
        packed = PackedRunner(made.runner.backbone, made.pool.count + 1, made.pool.size)
        made.runner = GraphRunner(packed, made.scheduler.rules.max_rows, 32, record=Again)
    prompts = ["p0", "p0", None, "p1", "p0", "p2", "p0"]
    requests = [greedy(text, name, 6) for text, name in zip(texts(7), prompts, strict=True)]
    events = run(made, requests)
    return [tokens(events[request.request_id, 0]) for request in requests]


@pytest.mark.parametrize("recorded", [True, False])
def test_an_engine_decodes_by_it(folder, monkeypatch, recorded):
    found = []
    kernels = dispatch.kernels
    monkeypatch.setattr(dispatch, "kernels", lambda op, impl: (found.append(impl), kernels(op, impl))[1])
    by_cuda = answers(folder, recorded)
    assert found.count("cuda") >= 10 and found.count("reference") > 0  # prefill
    monkeypatch.setenv("FASTPROMPT_IMPL", "reference")
    found.clear()
    assert by_cuda == answers(folder, recorded) and set(found) == {"reference"}
