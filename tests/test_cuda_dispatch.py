"""The CUDA path without its extension: which calls it gets, what it hands over, why it does not run."""

import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.gpu_check.grid import DECODING, GRID
from fastprompt import costs, dispatch, native, ops
from fastprompt.errors import ArgumentError, ImplementationError
from fastprompt.plan import BatchPlan

OP = "paged_prefix_attention"
MODULE = f"fastprompt._cuda.{OP}"
SHARED = "paged_prefix_attention decode, shared prefixes"


class Handed:
    """Stands in for the extension: notes calls, and fills results so that who ran can be told."""

    def __init__(self, room: int = 48) -> None:
        self.calls: list[tuple] = []
        self.room = room

    def Decode(self, *given):
        held = [weakref.ref(x) if isinstance(x, torch.Tensor) else lambda x=x: x for x in given]
        kinds = [type(x) for x in given]
        return SimpleNamespace(workspace_bytes=self.room, run=lambda *more: self._run(held, kinds, more))

    def _run(self, held, kinds, more):
        given = [x() for x in held]
        assert [type(x) for x in given] == kinds  # whoever made a tensor for the call keeps it until it is launched
        self.calls += [tuple(given), more]
        given[0].fill_(7.0)
        if given[1] is not None:
            given[1].fill_(8.0)


@pytest.fixture
def extension(monkeypatch):
    """The stand-in under impl "cuda" on tensors in main memory, which is the best there."""

    def forget():
        sys.modules.pop(MODULE, None)
        dispatch._load.cache_clear()

    found = Handed()
    monkeypatch.setattr(native, "load_cuda", lambda: found)
    monkeypatch.setitem(dispatch._DEVICES, "cuda", "cpu")
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setitem(dispatch._table, (OP, "cuda"), dispatch.Implementation(MODULE, lambda: None))
    monkeypatch.setattr(dispatch, "_best_known", {})
    monkeypatch.delenv("FASTPROMPT_IMPL", raising=False)
    forget()
    yield found
    forget()


def call(name=SHARED, **plan):
    """Tensors of a call, and its plan."""
    made = GRID[name](torch.bfloat16)
    t = made.tensors
    given = {"queries": list(made.queries)} | plan
    return dict(t), BatchPlan.build(t["prefix_start"], t["prefix_len"], **given), made.settings


# which calls it gets


def test_it_gets_what_it_takes_unless_another_is_named(extension):
    for name in DECODING:
        tensors, plan, settings = call(name)
        out, lse = ops.paged_prefix_attention(**tensors, plan=plan, **settings)
        assert (out == 7).all() and (lse == 8).all(), name
        out, _ = ops.paged_prefix_attention(**tensors, plan=plan, impl="reference", **settings)
        assert not (out == 7).all(), name


def test_what_it_does_not_take_goes_to_the_next_best_or_is_refused(extension):
    tensors, plan, _ = call()
    prefill = GRID["paged_prefix_attention ragged"](torch.bfloat16)
    mixed = BatchPlan.build(
        prefill.tensors["prefix_start"], prefill.tensors["prefix_len"], queries=list(prefill.queries)
    )
    wide = {n: torch.nn.functional.pad(x, (0, 1))[..., :128] for n, x in tensors.items() if n in ("k_cache", "v_cache")}
    narrow = {n: x[..., :80].contiguous() for n, x in tensors.items() if x.is_floating_point()}
    refused = [
        (tensors, None, "a plan built with queries"),
        (prefill.tensors, mixed, "not every row has one"),
        (tensors | narrow, plan, "80 and 80 numbers, expected the same for both, one of 64, 96, 128, 256"),
        (tensors | wide, plan, "k_cache begins at element 0 and has strides"),
        (tensors | {"q": tensors["q"].repeat(1, 5, 1)}, plan, "20 query heads share"),
    ]
    for given, planned, reason in refused:
        with pytest.raises(ImplementationError, match=f"'cuda' cannot run {OP}: .*{reason}.*use None"):
            ops.paged_prefix_attention(**given, plan=planned, impl="cuda")
        assert not (ops.paged_prefix_attention(**given, plan=planned) == 7).all(), reason
    assert not extension.calls


def test_single_precision_is_not_for_it(extension):
    tensors, plan, _ = call()
    single = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    with pytest.raises(ImplementationError, match=r"got torch.float32, expected torch.bfloat16, torch.float16"):
        ops.paged_prefix_attention(**single, plan=plan, impl="cuda")
    assert not (ops.paged_prefix_attention(**single, plan=plan) == 7).all()


def test_what_another_path_does_for_less_is_left_to_it(extension, monkeypatch):
    tensors, plan, _ = call()
    usual = costs.table("cpu")
    slow = replace(usual, paths=usual.paths | {"cuda": replace(usual.paths["cuda"], launch_us=99.0)})
    monkeypatch.setattr(costs, "table", lambda device: slow)
    assert not (ops.paged_prefix_attention(**tensors, plan=plan) == 7).all()
    assert (ops.paged_prefix_attention(**tensors, plan=plan, impl="cuda") == 7).all()  # whoever asks for it gets it


def test_a_plan_knows_whether_every_row_has_one_query():
    def build(queries):
        return BatchPlan.build([0, 0, 9], [9, 9, 4], queries=queries)

    assert build([1, 1, 1]).decoding == (2, 13) == build(torch.tensor([1, 1, 1])).decoding
    assert build([1, 2, 1]).decoding is None and build([1, 0, 1]).decoding is None
    assert BatchPlan.build([0], [9]).decoding is None
    held, mixed = (BatchPlan.build([0] * 3, [9] * 3, capacity_rows=4, queries=q) for q in ([1, 1, 1], [1, 2, 1]))
    with pytest.raises(ArgumentError, match="rows of one query each, the other has rows of more"):
        held.copy_(mixed)
    assert mixed.copy_(held) is mixed


# what it hands over


@pytest.mark.parametrize("need_lse", [True, False])
def test_the_kernel_gets_the_tensors_themselves(extension, need_lse):
    tensors, plan, _ = call(capacity_rows=30)
    q = tensors["q"].transpose(0, 1).contiguous().transpose(0, 1)  # as a model hands it over
    result = ops.paged_prefix_attention(
        **tensors | {"q": q}, plan=plan, scale=0.3, softcap=5.0, return_lse=need_lse, sinks=torch.ones(16)
    )
    given, run = extension.calls
    out, lse = result if need_lse else (result, None)
    names = (
        "q",
        "k_cache",
        "v_cache",
        "block_table",
        "q_start",
        "kv_len",
        "prefix_k",
        "prefix_v",
        "prefix_start",
        "prefix_len",
    )
    wanted = [out, lse, *(tensors[n] if n != "q" else q for n in names)]
    for got, want in zip(given, wanted, strict=False):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.data_ptr(), got.shape, got.stride()) == (want.data_ptr(), want.shape, want.stride())
    sinks, tile_of_row, tiles, scale, window, softcap, device, *scales = given[12:]
    assert sinks.tolist() == [1.0] * 16 and (scale, window, softcap, device, scales) == (0.3, 0, 5.0, 0, [None, None])
    assert tile_of_row.data_ptr() == plan.sharing.data_ptr() and torch.equal(tile_of_row, plan.sharing[:30])
    assert torch.equal(tiles, plan.tiles) and tiles.shape == (7, 16)
    workspace, size, stream = run
    assert workspace % 16 == 0 and workspace != 0 and (size, stream) == (48, 0)


def test_lists_of_another_kind_are_made_its_own(extension):
    tensors, plan, _ = call()
    indices = ("block_table", "q_start", "kv_len", "prefix_start", "prefix_len")
    wide = {n: tensors[n].long() for n in indices}
    ops.paged_prefix_attention(**tensors | wide, plan=plan, sinks=torch.ones(16, dtype=torch.float64))
    given = extension.calls[0]
    for at, name in zip((5, 6, 7, 10, 11), indices, strict=True):
        assert given[at].dtype == torch.int32 and torch.equal(given[at], tensors[name])
    assert given[12].dtype == torch.float32


def test_nobody_shares_with_a_window_or_without_lists(extension):
    extension.room = 0
    tensors, plan, _ = call()
    few = {
        n: x[:3] if n not in ("k_cache", "v_cache", "prefix_k", "prefix_v", "q_start") else x
        for n, x in tensors.items()
    }
    few["q_start"] = tensors["q_start"][:4]
    alone = BatchPlan.build(few["prefix_start"], few["prefix_len"], capacity_rows=3, queries=[1] * 3)
    for given, more in ((tensors, {"plan": plan, "window": 2**40}), (few, {"plan": alone})):
        extension.calls.clear()
        ops.paged_prefix_attention(**given, **more)
        assert extension.calls[0][13:15] == (None, None) and extension.calls[1] == (0, 0, 0)
        assert extension.calls[0][16] == (2**30 if "window" in more else 0)


def test_no_rows_launch_nothing(extension):
    tensors, _, _ = call()
    none = {n: x if n in ("k_cache", "v_cache", "prefix_k", "prefix_v") else x[:0] for n, x in tensors.items()}
    none["q_start"] = torch.zeros(1, dtype=torch.int32)
    out, lse = ops.paged_prefix_attention(
        **none, plan=BatchPlan.build([], [], queries=[]), impl="cuda", return_lse=True
    )
    assert out.shape == (0, 16, 128) and lse.shape == (16, 0) and not extension.calls


# why it does not run


def test_obstacles(monkeypatch):
    def said():
        native.cuda_obstacle.cache_clear()
        return native.cuda_obstacle()

    def missing():
        raise ImplementationError("it is not built")

    monkeypatch.setattr(native, "load_cuda", missing)
    assert said() == "it is not built"
    built = SimpleNamespace(archs=lambda: "80;90a")
    monkeypatch.setattr(native, "load_cuda", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "a GPU and its driver are not installed" in said()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fine in (((9, 0), True), ((8, 6), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert (said() is None) == fine
    native.cuda_obstacle.cache_clear()


def test_code_runs_on_the_gpus_it_was_built_for():
    def runs(major, minor, archs):
        return native.not_built_for((major, minor), archs) is None

    assert runs(8, 0, "80") and runs(8, 9, "80") and not runs(8, 0, "89") and not runs(9, 0, "80;89")
    assert runs(9, 0, "90a") and not runs(10, 0, "90a") and not runs(10, 3, "100a")
    assert runs(10, 3, "80;100") and not runs(12, 0, "80;100") and runs(12, 0, "80;100+PTX") and runs(9, 0, "80+PTX")
    assert "built for sm_80, sm_90a and the GPU is sm_120" in native.not_built_for((12, 0), "80;90a")
    assert "FASTPROMPT_CUDA_ARCHS=75, which needs compute capability 8.0" in native.not_built_for((7, 5), "80")


@pytest.mark.skipif(native.cuda_obstacle() is None, reason="it runs here")
def test_the_table_of_ops_says_why():
    rows = {(r.op, r.impl): r for r in dispatch.explain()}
    assert rows[OP, "cuda"].reason == native.cuda_obstacle()
    assert rows["merge_states", "cuda"].reason == "there is no CUDA kernel for it"
    with pytest.raises(ImplementationError, match="impl asks for 'cuda'"):
        ops.paged_prefix_attention(**call()[0], impl="cuda")


def test_nobody_is_told_that_an_extra_is_missing(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "_best_known", {})
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setitem(dispatch._table, (OP, "triton"), dispatch.Implementation("", lambda: None))
    if native.cuda_obstacle() is not None:
        assert dispatch.choose(OP, None, torch.device("cuda"), torch.bfloat16) == "triton"
    assert not recwarn.list
