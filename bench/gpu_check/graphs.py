"""The ops where a framework runs them: torch.compile, CUDA graphs, other streams and devices, the caching allocator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from bench.gpu_check import timing
from bench.gpu_check.calls import Call
from bench.gpu_check.grid import GRID
from bench.gpu_check.records import Emit, NotAvailable
from bench.gpu_check.setting import Setting
from bench.measure import CheckFailed
from fastprompt import dispatch, ops
from fastprompt.plan import BatchPlan

_CALLS = (  # of every op one, and attention in the forms that a model and an engine capture
    "prefix_attention causal", "prefix_attention static cache", "prefix_attention one query",
    "paged_prefix_attention shared prefixes", "paged_prefix_attention cut into parts", "embed_prompts left",
    "merge_states", "grouped_linear even size",
)  # fmt: skip
_DECODING = ("paged_prefix_attention decode, shared prefixes", "paged_prefix_attention decode, cut into parts")
_BY_CUDA = ", by the CUDA kernel"
_DTYPE = torch.bfloat16
_BUSY = 20_000_000  # cycles a stream is kept busy, so that whoever does not wait for it reads too early
_SIZES = 60  # calls of changing sizes


def units(setting: Setting) -> Sequence[str]:
    compiled = [f"torch.compile: {name}" for name in _CALLS]
    if not setting.on_gpu:
        return compiled
    by_cuda = [f"{name}{_BY_CUDA}" for name in _DECODING]
    compiled += [f"torch.compile: {name}" for name in by_cuda]
    captured = [f"CUDA graph: {name}" for name in (*_CALLS, *_DECODING, *by_cuda)]
    return [*compiled, *captured, "another stream", "another device", "memory"]


def run(unit: str, setting: Setting, emit: Emit) -> None:
    """One of them; `CheckFailed` where a result differs from the plain call's."""
    kind, _, name = unit.partition(": ")
    if kind == "torch.compile":
        _compiled(name, setting)
    elif kind == "CUDA graph":
        _captured(name, setting)
    else:
        {"another stream": _stream, "another device": _device, "memory": _memory}[kind](setting)


def _build(name: str, setting: Setting, seed: int = 0) -> tuple[Call, str]:
    call = GRID[name.removesuffix(_BY_CUDA)](_DTYPE, seed).to(setting.device)
    if not name.endswith(_BY_CUDA):
        return call, setting.chosen(call.op, _DTYPE)
    reason = dispatch.obstacle(call.op, "cuda")
    if reason:
        raise NotAvailable(reason)
    return call, "cuda"


def _found_by_cuda() -> list[str]:
    """Calls by the CUDA kernel, where it runs."""
    there = dispatch.obstacle("paged_prefix_attention", "cuda") is None
    return [f"{name}{_BY_CUDA}" for name in _DECODING] if there else []


def _compiled(name: str, setting: Setting) -> None:
    """One graph without a break, forward and backward, with the bits of the plain call."""
    call, impl = _build(name, setting)
    op, plan = getattr(ops, call.op), call.plan() if name.endswith(_BY_CUDA) else {}
    torch.compiler.reset()
    backend = "inductor" if setting.on_gpu else "aot_eager"
    function = torch.compile(lambda **tensors: op(**tensors, **plan, impl=impl), fullgraph=True, backend=backend)
    _equal(call.results(function), call.ours(impl))


def _captured(name: str, setting: Setting) -> None:
    """A graph recorded on some numbers, extents and page tables gives the plain call's bits on others of the shape."""
    call, impl = _build(name, setting)
    holds, plan = call.map(Tensor.clone), call.plan()
    record, result = timing.captured(lambda: _grads(holds, impl, plan))
    for seed in (1, 2, 0):
        fresh, _ = _build(name, setting, seed)
        fresh = _other_extents(fresh, seed)
        for what, x in holds.tensors.items():
            x.copy_(fresh.tensors[what])
        for name_of, new in fresh.plan().items():
            plan[name_of].copy_(new)
        for x in result.values():
            x.fill_(torch.nan)
        record.replay()
        torch.cuda.synchronize()
        _equal(result, _grads(fresh, impl, fresh.plan()))


def _grads(call: Call, impl: str, plan: Mapping[str, BatchPlan]) -> dict[str, Tensor]:
    """Outputs, and gradients of the first one's sum: nothing here comes from the host, so that it can be recorded."""
    op = getattr(ops, call.op)
    leaves = {n: call.tensors[n].detach().requires_grad_() for n in call.leaves}
    with torch.set_grad_enabled(bool(leaves)):
        found = op(**(dict(call.tensors) | leaves), **call.settings, **plan, impl=impl)
    outputs = found if isinstance(found, tuple) else (found,)
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        grads = torch.autograd.grad(outputs[0], list(leaves.values()), torch.ones_like(outputs[0]), allow_unused=True)
        named |= {f"d{n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return named


def _other_extents(call: Call, seed: int) -> Call:
    """The rows' prompts in another order: what a later batch brings."""
    starts = {"prefix_attention": "prefix", "paged_prefix_attention": "prefix", "embed_prompts": "prompt"}
    stem = starts.get(call.op)
    if stem is None or "positions" in call.tensors:
        return call
    rows = call.tensors[f"{stem}_len"].shape[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(call.tensors[f"{stem}_len"].device)
    changed = dict(call.tensors)
    for name in (f"{stem}_start", f"{stem}_len"):
        changed[name] = changed[name][order]
    return replace(call, tensors=changed)


def _stream(setting: Setting) -> None:
    """A call on a stream that is late reads what that stream wrote, and is done when the stream is."""
    for name in (*_CALLS, *_found_by_cuda()):
        call, impl = _build(name, setting)
        want = call.ours(impl)
        held = call.map(lambda x: torch.zeros_like(x))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream(setting.device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(_BUSY)
            for what, x in held.tensors.items():
                x.copy_(call.tensors[what])
            got = held.ours(impl)
        stream.synchronize()
        _equal(got, want)


def _device(setting: Setting) -> None:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        raise NotAvailable("there is one GPU")
    for name in (*_CALLS, *_found_by_cuda()):
        call, impl = _build(name, setting)
        there = call.to("cuda:1")
        with torch.cuda.device(0):
            got = there.ours(impl)
        if any(x.device != torch.device("cuda:1") for x in got.values()):
            raise CheckFailed(f"{name}: results are not on the device of the tensors")
        _equal({n: x.to(setting.device) for n, x in got.items()}, call.ours(impl))


def _memory(setting: Setting) -> None:
    """Calls of many sizes leave no memory behind."""
    random = Random(0)
    call, impl = _build("prefix_attention causal", setting)
    call.ours(impl)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(_SIZES):
        rows = random.randint(1, call.tensors["q"].shape[0])
        whole = ("prefix_k", "prefix_v")
        part = Call(
            call.op, {n: x if n in whole else x[:rows] for n, x in call.tensors.items()}, call.leaves, call.settings
        )
        part.ours(impl)
    timing.release()
    after = torch.cuda.memory_allocated()
    if after != before:
        raise CheckFailed(f"{_SIZES} calls leave {after - before} bytes behind")


def _equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    for name, x in want.items():
        if not torch.equal(got[name], x):
            gap = (got[name].double() - x.double()).abs().nan_to_num(torch.inf).max().item() if x.numel() else 0.0
            raise CheckFailed(f"{name} has other bits than the plain call's, by {gap:.2e}")
