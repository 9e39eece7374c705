"""The peers of gpu-check are given what is right, by stand-ins for those that are not installed.

The full-size cases are gone through on tensors without storage: shapes, dtypes, and that all stays on their device.
"""

from __future__ import annotations

import types
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from gpu_peers import FLASH, FLASHINFER, in_parts
from torch import Tensor

from bench import attention_baselines as baselines
from bench.attention_cases import Case
from bench.attention_check import truth
from bench.attention_inputs import Inputs, build
from bench.gpu_check import cases, contestants, installed_peers, paging, timing, torch_peers
from bench.gpu_check.setting import Setting
from fastprompt import dispatch
from fastprompt.plan import BatchPlan

DECODE = Case(6, 3, 32, 1, 21, (4, 2), 16)
LONELY = Case(5, 5, 16, 1, 32, (2, 2), 16)
PREFILL = Case(4, 2, 16, 19, 19, (4, 2), 16)
TRAIN = Case(4, 2, 16, 19, 19, (4, 2), 16, backward=True)
GPU = Setting("cuda")


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
