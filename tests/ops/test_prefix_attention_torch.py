"""prefix_attention as a citizen of torch: gradcheck, opcheck, compile, and what it allocates."""

import pytest
import torch
from op_cases import INF, assert_same, attention, results
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt import ops
from fastprompt.plan import BatchPlan

EXTENTS = [(3, 3), (4, 3), (0, 0), (3, 3)]


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(
    "features", [{}, {"sinks": True, "kv_start": [0, -2, 5]}, {"sinks": True, "bias": (1, 2, 1), "softcap": 3.0}]
)
def test_gradients_are_those_of_finite_differences(features, queries):
    call = attention(EXTENTS[:3], queries=queries, keys=5, heads=(2, 1), dims=(3, 3), tokens=7, **features)
    call, names = call.leaves()

    def with_lse(*leaves):
        out, lse = call.with_tensors(**dict(zip(names, leaves, strict=True)))(ops.prefix_attention, return_lse=True)
        return out, lse.masked_fill(lse == -INF, 0.0)

    def without(*leaves):
        return call.with_tensors(**dict(zip(names, leaves, strict=True)))(ops.prefix_attention)

    leaves = [call.tensors[n] for n in names]
    assert torch.autograd.gradcheck(without, leaves)
    if features:
        assert torch.autograd.gradcheck(with_lse, leaves)


def _registered(call, plan, need_lse):
    t, s = call.tensors, call.settings
    names = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_start", "prefix_len", "sinks", "bias", "prefix_bias",
             "kv_start", "kv_len", "q_start")  # fmt: skip
    tensors = [t.get(n) for n in names]
    return (*tensors, True, 0.3, s.get("window"), s.get("softcap"), plan, need_lse, "reference")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"dtype": torch.float32, "window": 4, "kv_start": [0, 2, 5, -1]},
        {"sinks": True, "bias": (1, 4, 1), "softcap": 3.0, "kv_len": [5, 3, 2, 4]},
    ],
)
def test_opcheck(features, strided):
    call = attention(EXTENTS, queries=5, keys=5, strided=strided, **features)
    packed = BatchPlan.build(*zip(*EXTENTS, strict=True)).packed
    for plan, leaves in ((None, call.leaves()[0]), (packed, call.leaves()[0])):
        torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, _registered(leaves, plan, True))
    torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, _registered(call, packed, False))


@pytest.mark.parametrize("wanted", [[True] * 8, [False, True] * 4])
def test_opcheck_of_the_backward(wanted):
    call = attention(EXTENTS, queries=5, keys=5, strided=True, sinks=True, bias=(1, 4, 1))
    *args, _, impl = _registered(call, None, True)
    out, lse = torch.ops.fastprompt.prefix_attention.default(*args, True, impl)
    for dlse in (None, torch.rand_like(lse)):
        torch.library.opcheck(
            torch.ops.fastprompt.prefix_attention_backward.default,
            (torch.rand_like(out), dlse, out, lse, *args, wanted, impl),
        )


@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize(("queries", "backend"), [(1, "aot_eager"), (5, "aot_eager"), (5, "inductor")])
def test_compiles_whole(queries, backend, with_plan):
    torch.compiler.reset()
    extents = [(3, 5), (10, 9), (3, 5), (0, 0)]
    call = attention(extents, queries=queries, keys=6, dtype=torch.float32, kv_start=[0, 1, 2, 0], sinks=True)
    plan = BatchPlan.build(*zip(*extents, strict=True)) if with_plan else None
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend=backend)
    for lse in (False, True):
        want = results(call, ops.prefix_attention, lse=lse, plan=plan)
        assert_same(results(call, compiled, lse=lse, plan=plan), want, 1e-6)


def test_a_compiled_step_takes_any_plan_of_its_size():
    torch.compiler.reset()
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for extents in ([(3, 5), (10, 9), (3, 5), (0, 0)], [(0, 0)] * 4, [(1, 2), (2, 2), (3, 2), (4, 2)]):
            call = attention(extents, queries=2, keys=6)
            plan = BatchPlan.build(*zip(*extents, strict=True), capacity_rows=4)
            torch.testing.assert_close(call(compiled, plan=plan), call(ops.prefix_attention, plan=plan))


class _Largest(TorchDispatchMode):
    """Records the most numbers any operation put into new memory."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for t in _tensors(out):
            if t.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.itemsize)
        return out


def _tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("features", [{}, {"softcap": 5.0}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("layout", ["one", "even", "uneven"])
@pytest.mark.parametrize("queries", [1, 6])
def test_nothing_of_rows_by_prefix_by_head_size_is_allocated(queries, layout, features):
    rows, length, dim = 12, 50, 64
    starts = {"one": [0] * rows, "even": [5 * i for i in range(rows)], "uneven": [5 * i + i % 2 for i in range(rows)]}
    extents = [(s, length) for s in starts[layout]]
    call = attention(extents, queries=queries, keys=8, heads=(4, 2), dims=(dim, dim), tokens=120, **features)
    with _Largest() as largest:
        results(call, ops.prefix_attention, lse=False)
    own = max(rows * 4 * queries * max(dim, length + 8), 2 * 120 * dim)  # q or its logits, one arena layer
    assert own < rows * 2 * length * dim / 2
    assert largest.numbers <= 1.1 * own
