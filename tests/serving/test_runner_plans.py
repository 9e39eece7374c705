"""Plans of eager steps: which rows read their prompt together is worked out where kernels look at it, only there."""

from dataclasses import replace

import pytest
import torch
from serving_cases import backbone, greedy, run, save_prompts, texts, tokens

from fastprompt import costs, dispatch
from fastprompt.batch import Extent
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.plan import BatchPlan, Decoding
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.runner import PackedRunner, Slice

LONG, SHORT = Extent(0, 1200, (0, 1), 1200), Extent(1200, 5, (0,), 5)  # SHORT is not in layer 1
ARENAS = [torch.zeros(2, 1205, 8)] * 2


@pytest.fixture
def packed(monkeypatch):
    """Makes the runner of a backbone of two layers, on whose device rows may share or may not."""

    def make(shares):
        monkeypatch.setattr(dispatch, "reads_together", lambda device, dtype: shares)
        return PackedRunner(inspect_backbone(backbone()), 4, 4)

    return make


def plans(runner, counts, extents):
    """Each layer's plan of a step in which the rows run so many tokens."""
    slices = [Slice([1] * n, 0, [0], e, True, ()) for n, e in zip(counts, extents, strict=True)]
    return [rows.plan for rows in runner._prefixes(slices, (ARENAS, ARENAS)).layer_rows]


def together(plan):
    """The rows of each tile."""
    return [] if plan.tiles is None else [[r for r in tile if r >= 0] for tile in plan.tiles.tolist() if tile[0] >= 0]


def test_rows_that_decode_share_and_texts_do_not(packed):
    runner, extents = packed(True), [LONG] * 9 + [SHORT, None]
    first, second = plans(runner, [1] * 11, extents)
    assert together(first) == together(second) == [list(range(9))]
    assert (first.decoding, second.decoding) == (Decoding(2, 1205), Decoding(1, 1200))
    mixed = plans(runner, [1, 1, 7, *[1] * 8], extents)[0]
    assert together(mixed) == [[0, 1, 3, 4, 5, 6, 7, 8]] and mixed.decoding is None


def test_plans_are_kept_while_the_same_rows_decode(packed):
    runner, extents = packed(True), [LONG] * 6
    text = plans(runner, [1, 1, 1, 1, 1, 40], extents)[0]
    assert plans(runner, [1, 1, 1, 1, 1, 8], extents)[0] is text  # the rest of the text
    step = plans(runner, [1] * 6, extents)[0]
    assert step is not text and together(step) == [list(range(6))]
    assert plans(runner, [1] * 6, extents)[0] is step


def test_nothing_is_worked_out_where_no_kernel_looks_at_it(packed, monkeypatch):
    runner, extents = packed(False), [LONG] * 9
    asked, build = [], BatchPlan.build

    def spied(*args, **more):
        asked.append(more["queries"])
        return build(*args, **more)

    monkeypatch.setattr(BatchPlan, "build", spied)
    step = plans(runner, [1] * 9, extents)[0]
    assert (step.sharing, step.decoding, asked) == (None, None, [None])
    assert plans(runner, [*[1] * 8, 5], extents)[0] is step  # kept whatever the rows run


@pytest.mark.parametrize(("impl", "shares"), [("cuda", True), ("triton", True), ("cpu", False), ("reference", False)])
def test_it_follows_what_runs_there(monkeypatch, impl, shares):
    asked = []
    monkeypatch.setattr(dispatch, "choose", lambda *args: (asked.append(args), impl)[1])
    device = torch.device("cuda", 1)
    assert dispatch.reads_together(device, torch.bfloat16) is shares
    assert asked == [("paged_prefix_attention", None, device, torch.bfloat16)]


def test_an_engine_answers_the_same(tmp_path, monkeypatch):
    """Kernels of the CPU pass over what such a plan says."""
    save_prompts(tmp_path, 3)
    cheap, answers = replace(costs.table("cpu"), state_tokens=0, least_saving=0), []
    monkeypatch.setattr(costs, "table", lambda device: cheap)
    read = PackedRunner._prefixes
    for shares in (False, True):
        seen = []
        monkeypatch.setattr(dispatch, "reads_together", lambda device, dtype, s=shares: s)
        monkeypatch.setattr(PackedRunner, "_prefixes", lambda *args, s=seen: (s.append(read(*args)), s[-1])[1])
        made = build_engine(backbone(), tmp_path, EngineOptions(block_size=4, max_model_len=64, device_bytes=2**22))
        requests = [greedy(text, f"p{i % 2 * 2}", 5) for i, text in enumerate(texts(10))]
        events = run(made, requests)
        made.residency.close()
        answers.append([tokens(events[request.request_id, 0]) for request in requests])
        assert any(together(batch.layer_rows[0].plan) for batch in seen) is shares
    assert answers[0] == answers[1]
