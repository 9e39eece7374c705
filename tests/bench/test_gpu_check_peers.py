"""The peers of gpu-check: what they are given is right, by stand-ins that do on the CPU what their documentation says.

The full-size cases are gone through on tensors without storage: shapes, dtypes, and that all stays on their device.
"""

from __future__ import annotations

import math
import types
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import attention_baselines as baselines
from bench.attention_cases import Case
from bench.attention_check import truth
from bench.attention_inputs import Inputs, build
from bench.gpu_check import cases, contestants, graphs, installed_peers, micro, paging, timing, torch_peers
from bench.gpu_check.setting import Setting
from bench.measure import CheckFailed
from fastprompt import dispatch
from fastprompt.plan import BatchPlan

DECODE = Case(6, 3, 32, 1, 21, (4, 2), 16)
LONELY = Case(5, 5, 16, 1, 32, (2, 2), 16)
PREFILL = Case(4, 2, 16, 19, 19, (4, 2), 16)
TRAIN = Case(4, 2, 16, 19, 19, (4, 2), 16, backward=True)
GPU = Setting("cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """`[N, Hq, D]` over `[S, Hkv, D]`, causal to the lower right."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    logits = q.transpose(0, 1) @ k.mT / math.sqrt(q.shape[2])
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[0])
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1)


def in_parts(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, causal: bool) -> Tensor:
    spans = zip(q_at[:-1], q_at[1:], k_at[:-1], k_at[1:], strict=True)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal) for a, b, c, d in spans])


class Level:
    """A level of pages as FlashInfer documents it."""

    def __init__(self, q_at: Tensor, page_at: Tensor, pages: Tensor, last: Tensor, size: int) -> None:
        assert all(x.dtype == torch.int32 for x in (q_at, page_at, pages, last))
        self.q_at, self.page_at, self.pages, self.last, self.size = q_at, page_at, pages, last, size

    def states(self, q: Tensor, caches: tuple[Tensor, Tensor], causal: bool) -> tuple[Tensor, Tensor]:
        """Logits' exponentials summed, with and without values: what merging needs."""
        weighted, total = [], []
        for g in range(len(self.q_at) - 1):
            mine = self.pages[self.page_at[g] : self.page_at[g + 1]].long()
            tokens = (len(mine) - 1) * self.size + int(self.last[g])
            k, v = (c[mine].flatten(0, 1)[:tokens] for c in caches)
            queries = q[self.q_at[g] : self.q_at[g + 1]]
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            logits = queries.transpose(0, 1) @ k.mT / math.sqrt(q.shape[2])
            if causal:
                seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(tokens - len(queries))
                logits = logits.masked_fill(~seen, -torch.inf)
            weights = logits.exp()
            weighted.append((weights @ v).transpose(0, 1))
            total.append(weights.sum(-1).T)
        return torch.cat(weighted), torch.cat(total)


class Cascade:
    def __init__(self, levels: int, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.count = levels

    def plan(self, q_at, page_at, pages, last, heads, kv_heads, dim, size, causal=False, **dtypes) -> None:
        levels = zip(q_at, page_at, pages, last, strict=True)
        self.levels = [Level(*given, size) for given in levels]
        self.causal = causal
        assert len(self.levels) == self.count and dtypes.keys() == {"q_data_type", "kv_data_type"}

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        states = [level.states(q, caches, self.causal and i == self.count - 1) for i, level in enumerate(self.levels)]
        return sum(s[0] for s in states) / sum(s[1] for s in states)[..., None]


class ByRow:
    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD"

    def plan(self, indptr, indices, last, heads, kv_heads, dim, size, **dtypes) -> None:
        q_at = torch.arange(len(indptr), dtype=torch.int32)
        self.level = Level(q_at, indptr, indices, last, size)

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor]) -> Tensor:
        weighted, total = self.level.states(q, caches, False)
        return weighted / total[..., None]


FLASHINFER = types.SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade, BatchDecodeWithPagedKVCacheWrapper=ByRow)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.stack([attend(*row, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, causal: bool) -> Tensor:
    assert cache_seqlens.dtype == torch.int32 and set(cache_seqlens.tolist()) == {k.shape[1]}
    return flash_attn_func(q, k, v, causal)


FLASH = types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def assert_right(case: Case, entry: baselines.Entry) -> None:
    with torch.no_grad():
        inputs = build(case, "fp32")
        found = entry.named(entry.build(inputs)())
        repeated = "repeated" in entry.about  # keys that stand several times have gradients of their own
        assert found.keys() == ({"out", *(("dq",) if repeated else ("dq", "dk", "dv"))} if case.backward else {"out"})
        truth(case, inputs).errors(entry.about, found, slack=8.0)


@pytest.mark.parametrize("case", [DECODE, LONELY, PREFILL, TRAIN], ids=lambda c: c.name)
def test_installed_peers_are_given_what_they_expect(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"flash_attn": FLASH, "flash_attn_interface": FLASH, "flashinfer": FLASHINFER}
    monkeypatch.setattr(installed_peers.importlib, "import_module", libraries.__getitem__)
    names = []
    for who in installed_peers.contestants(case):
        names.append(who.name)
        for entry in who.forms(case, build(case, "fp32")):
            assert_right(case, entry)
    paged = [] if case.backward else ["flashinfer cascade"]
    by_row = ["flashinfer by row"] if case.queries == 1 else []
    assert names == ["flash-attn", "flash-attn 3", *by_row, *paged]


def test_peers_that_are_not_installed_say_so() -> None:
    found = {who.name: who.obstacle for who in installed_peers.contestants(DECODE)}
    for name, module in (("flashinfer cascade", "flashinfer"), ("flash-attn", "flash_attn")):
        if installed_peers.importlib.util.find_spec(module) is None:
            assert found[name] == f"{module} is not installed"


@pytest.mark.parametrize("case", [DECODE, PREFILL, TRAIN], ids=lambda c: c.name)
@pytest.mark.parametrize("older", [False, True])
def test_variable_length_attention_is_given_what_it_expects(case: Case, older: bool, monkeypatch) -> None:
    """Newer torch says causal by a window and is told of grouped heads."""
    from torch.nn.attention import varlen

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert (max_q, max_k) == (case.queries, case.prefix + case.keys)
        return in_parts(query, key, value, cu_seq_q, cu_seq_k, is_causal)

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    monkeypatch.setattr(varlen, "varlen_attn", old if older else new)
    assert_right(case, torch_peers._varlen(case))


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda c: c.name)  # uncompiled, it has no gradients
def test_flex_attention_is_given_what_it_expects(case: Case, monkeypatch) -> None:
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(torch_peers, "_flex_compiled", lambda: flex_attention.flex_attention)
    assert_right(case, torch_peers._flex(case))


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
@pytest.mark.parametrize("case", [DECODE, PREFILL, TRAIN], ids=lambda c: c.name)
def test_every_form_of_sdpa_is_attention(case: Case, backend: str) -> None:
    inputs = build(case, "fp32")
    entries = [*torch_peers._ready(backend, case, inputs), *torch_peers._concatenating(backend, case, inputs)]
    assert entries
    for entry in entries:
        if "lower right" not in entry.about:  # that bias is materialised on a CPU, and float masks differ there
            assert_right(case, entry)


def test_pages_hold_the_keys() -> None:
    inputs = build(DECODE, "fp32")
    pages = paging.paged(inputs, spare=3)
    assert pages.table.dtype == torch.int32 and pages.table.min() == 3
    for row in range(DECODE.rows):
        k = pages.k[pages.table[row].long()].flatten(0, 1)
        assert torch.equal(k[: DECODE.keys], inputs.k[row].transpose(0, 1)) and k[DECODE.keys :].isnan().all()
    assert pages.k[:3].isnan().all()
    for entry in contestants.ours(DECODE, Setting("cpu", "reference")):
        assert_right(DECODE, entry.forms(DECODE, inputs)[0])


# on tensors without storage


@pytest.mark.parametrize("timed", cases.TIMED, ids=lambda t: t.name)
def test_contestants_at_full_size_by_shapes(timed: cases.Timed, monkeypatch) -> None:
    """All that is built and called for the full-size cases, but gradients, fits together and stays on the device."""
    case = replace(timed.case, backward=False)
    monkeypatch.setattr(dispatch, "choose", lambda *given: "triton")
    real = build(timed.shrunk().case, "bf16")
    plan = BatchPlan.build([0] * case.rows, [case.prefix] * case.rows)
    with torch.no_grad():
        inputs = replace(real._map(partial(_resized, real, case)), plan=plan, longest=case.prefix)
        assert inputs.k.is_meta and inputs.q.shape == (case.rows, case.heads[0], case.queries, case.dim)
        done = 0
        for who in contestants.all_of(case, GPU):
            if who.name == "flex" or who.obstacle:
                continue
            for entry in who.forms(case, inputs):
                with who.around() if "sdpa" not in who.name else nullcontext():
                    found = entry.named(entry.build(inputs)())
                assert all(x.is_meta for x in found.values())
                assert found["out"].shape == (case.rows, case.queries, case.heads[0], case.dim), (who.name, entry.about)
                done += 1
        assert done > 6


def _resized(real: Inputs, case: Case, x: Tensor) -> Tensor:
    """A tensor of shrunk inputs at its full size."""
    (hq, hkv), d, tokens = case.heads, case.dim, case.prompts * case.prefix
    shapes = {
        id(real.q): (case.rows, hq, case.queries, d), id(real.k): (case.rows, hkv, case.keys, d),
        id(real.v): (case.rows, hkv, case.keys, d), id(real.prefix_k): (hkv, tokens, d),
        id(real.prefix_v): (hkv, tokens, d), id(real.start): (case.rows,), id(real.length): (case.rows,),
        id(real.dout): (case.rows, case.queries, hq, d),
        id(real.mask): (1, 1, case.queries, case.prefix + case.keys),
    }  # fmt: skip
    return torch.empty(shapes[id(x)], dtype=x.dtype, device="meta")


def test_as_many_sets_as_leave_the_cache_cold(monkeypatch) -> None:
    facts = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 << 30, 0))
    counts = {mib: timing.set_count(mib << 20, "cuda") for mib in (1, 20, 100, 199, 200, 5000)}
    assert counts == {1: 64, 20: 6, 100: 2, 199: 2, 200: 1, 5000: 1}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 20, 0))
    assert timing.set_count(20 << 20, "cuda") == 1  # no room for more


def test_a_graph_replays_all_calls(monkeypatch) -> None:
    """Every set equally often, the result that of the last call."""
    made: list[int] = []

    def call(i: int) -> int:
        made.append(i)
        return i

    replay = types.SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "captured", lambda run: (replay, run()))
    monkeypatch.setattr(timing, "_look", lambda runs, device: 1e-4)
    timed = timing.graph([partial(call, i) for i in range(3)], "cuda", 1e-3)
    assert timed.calls == 12 and timed.result() == 2 and made == [0, 1, 2] * 4 and timed.ahead


class Pretended(Setting):
    """A run on the CPU that goes the ways of a GPU."""

    @property
    def on_gpu(self) -> bool:
        return True

    def chosen(self, op: str, dtype: torch.dtype) -> str:
        return "reference"


@pytest.fixture
def pretended(monkeypatch) -> Setting:
    """What only a GPU has does nothing; a recorded graph is run again by Python, into the same tensors."""

    def captured(run):
        result = run()

        def replay() -> None:
            for old, new in zip(micro.tensors(_listed(result)), micro.tensors(_listed(run())), strict=True):
                old.copy_(new)

        return types.SimpleNamespace(replay=replay), result

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch_peers, "_flex_compiled", lambda: torch_peers.baselines.sdpa)
    return Pretended("cpu", None, True, {"memory": 1e10, "bf16": 1e11})


def _listed(result):
    return list(result.values()) if isinstance(result, dict) else result


def test_all_modes_of_a_case(pretended: Setting) -> None:
    lines: list[dict] = []
    name = list(cases.timed(pretended))[3]
    micro.run(name, pretended, lambda kind, **values: lines.append({"kind": kind, **values}))
    modes = {(x["launch"], x["buffers"]) for x in lines if x["kind"] == "time" and x["name"] == cases.PAGED}
    assert modes == {("graph", "cold"), ("graph", "warm"), ("eager", "cold"), ("eager", "warm")}
    peers = {x["name"]: x["state"] for x in lines if x["kind"] == "peer"}
    assert peers["flex"] == "error"  # what stands in for it takes no block mask
    assert {x["over"] for x in lines if x["kind"] == "ratio"} >= {"sdpa flash", "concatenation + sdpa flash"}
    values = {x["target"]: x["value"] for x in lines if x["kind"] == "verdict"}
    assert [value for target, value in values.items() if target.startswith("CUDA")] == [None, None]  # it does not run
    assert len(values) == 4 and all(value > 0 for value in values.values() if value is not None)


def test_a_result_that_a_replay_does_not_write_is_red(pretended: Setting, monkeypatch) -> None:
    usual = timing.captured
    monkeypatch.setattr(timing, "captured", lambda run: (types.SimpleNamespace(replay=lambda: None), usual(run)[1]))
    with pytest.raises(CheckFailed, match=r"ours.*off by nan"):
        micro.run(next(iter(cases.timed(pretended))), pretended, lambda *a, **k: None)


@pytest.mark.parametrize("name", graphs._CALLS)
def test_replays_take_other_inputs(name: str, pretended: Setting) -> None:
    graphs.run(f"CUDA graph: {name}", pretended, lambda *a, **k: None)


def test_a_graph_that_keeps_old_results_is_red(pretended: Setting, monkeypatch) -> None:
    monkeypatch.setattr(timing, "captured", lambda run: (types.SimpleNamespace(replay=lambda: None), run()))
    with pytest.raises(CheckFailed, match="output 0 has other bits"):
        graphs.run("CUDA graph: merge_states", pretended, lambda *a, **k: None)
