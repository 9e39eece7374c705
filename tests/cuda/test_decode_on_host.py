"""The CUDA decode kernels on the host machine against the float64 oracle: indices, masks, copies, barriers, merging."""

import shutil
from random import Random

import pytest
import torch
from cuda_cases import SMALL, batch, check, random_case, run, settings
from cuda_machine import CODES, Copies, Loads, arguments, chip

from bench.gpu_check.cost_table import SHAPES
from fastprompt import costs
from fastprompt.costs import Decode

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")

HALVES = (torch.bfloat16, torch.float16)
DIMS = (64, 96, 128, 256)
PROMPT, OTHER, NONE = (3, 37), (45, 5), (0, 0)
MIXED = [PROMPT, OTHER, NONE, PROMPT, NONE, (7, 1), PROMPT]
OWN = [0, 1, 70, 16, 0, 33, 129]  # of each row; row 4 sees nothing
MANY = [PROMPT] * 18 + [OTHER] * 3 + [NONE]
TILES = [list(range(9)), list(range(9, 18)), [18, 19, 20]]


@pytest.fixture
def machine(host):
    return host


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_alone(machine, dtype, dim):
    for more in settings(4, dtype):
        check(machine, batch(MIXED, OWN, dim=dim, dtype=dtype, **more))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_that_read_together(machine, dtype, dim):
    for more in settings(4, dtype):
        own = [i % 7 * 9 for i in range(len(MANY))]
        schedule = check(machine, batch(MANY, own, dim=dim, dtype=dtype, together=TILES, room=6, **more))
        assert (schedule.shared_parts > 0) == ("window" not in more) == (schedule.merge_blocks > 0)


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_of_heads(machine, group):
    own = [i % 5 * 8 for i in range(len(MANY))]
    check(machine, batch(MANY, own, heads=(group, 1), together=TILES))
    check(machine, batch(MIXED, OWN, heads=(2 * group, 2), dtype=torch.float16))


@pytest.mark.parametrize("size", [1, 3, 16, 128])
def test_pages_of_any_size_and_order(machine, size):
    check(machine, batch(MIXED, OWN, size=size))
    check(machine, batch(MIXED, OWN, size=size, heads_first=True))


@pytest.mark.parametrize("loads", [Loads.ASYNC, Loads.BULK])
@pytest.mark.parametrize("e4m3", [False, True])
def test_copies_may_happen_at_any_time_and_warps_run_in_any_order(machine, loads, e4m3):
    own = [i % 6 * 35 for i in range(len(MANY))]
    b = batch(MANY, own, together=TILES, e4m3=e4m3)
    first = None
    for copies in Copies:
        for seed in range(3):
            check(machine, b, loads=loads, copies=copies, seed=seed)
            got, _ = run(machine, b, loads=loads, copies=copies, seed=seed)
            first = got if first is None else first
            assert all(torch.equal(got[n], first[n]) for n in got)


def test_both_ways_to_load_give_the_same_bits(machine):
    b = batch(MIXED, OWN, e4m3=True)
    one, other = (run(machine, b, loads=loads)[0] for loads in (Loads.ASYNC, Loads.BULK))
    assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("dim", DIMS)
def test_every_schedule(machine, capability, dim):
    """Stages and warps follow from a chip's shared memory."""
    schedule = check(machine, batch(MIXED, OWN, dim=dim), on=chip(capability, 1))
    assert schedule.shared_bytes <= chip(capability, 1).shared_per_block and 2 <= schedule.stages <= 4
    assert schedule.warps == (4 if dim < 256 or capability >= 90 else 2)


@pytest.mark.parametrize("sinks", [False, True])
def test_long_rows_and_prefixes_in_parts(machine, sinks):
    prompt = (1, 700)
    b = batch(
        [prompt, prompt, NONE, (5, 3), prompt, prompt], [530, 1, 1000, 0, 256, 257], tokens=800, heads=(4, 1),
        together=[[0, 1, 4, 5]], **({"sinks": torch.randn(4)} if sinks else {}),
    )  # fmt: skip
    schedule = check(machine, b, on=chip(90, 20))
    assert schedule.alone_parts > 1 and schedule.shared_parts > 1
    check(machine, batch([prompt, NONE], [300, 900], tokens=800), on=chip(90, 20))


@pytest.mark.parametrize("shape", [*SHAPES, *(Decode(1, 1, 0, own) for own in (511, 1023, 1024, 9000))], ids=str)
def test_parts_are_those_that_costs_are_counted_with(machine, shape):
    """Where arena and table hold what a row reads, and no more: else there may be others, which are empty."""
    b = batch(MIXED, OWN)
    a = arguments(*b.tensors, torch.empty_like(b.tensors[0]), None)
    a.rows, a.heads, a.kv_heads, a.head_dim = shape.rows, shape.heads, shape.kv_heads, shape.dim
    a.arena_tokens, a.max_blocks, a.block_size = shape.prefix, shape.own, 1
    on, state = chip(90, costs.FULL // 2), 2 * shape.rows * shape.heads * (shape.dim + 1) * 4
    alone = machine.schedule(a, on)
    work = shape.work("cuda", False)
    assert (alone.merge_blocks > 0) == (work.launches == 2) and 2 * alone.workspace_bytes == work.states
    a.tile_of_row, a.tiles, a.num_tiles = 64, 64, 1
    own = costs.parts(shape.rows * shape.kv_heads, shape.own, costs.OWN_PART["cuda"])
    assert machine.schedule(a, on).shared_parts == shape.work("cuda", True).states / state - own


def test_rows_of_other_than_one_query_are_passed_over(machine):
    counts = [1, 0, 3, 1, 2, 1, 1]
    check(machine, batch(MIXED, [max(n, c) for n, c in zip(OWN, counts, strict=True)], counts=counts))
    many = [1] * len(MANY)
    many[2], many[11] = 3, 0  # of tiles that were made for other queries
    b = batch(MANY, [5] * len(MANY), counts=many, together=TILES)
    check(machine, b)


def test_row_numbers_are_the_queries_places_without_q_start(machine):
    b = batch(MIXED, OWN)
    one, other = (run(machine, b, whole_rows=whole)[0] for whole in (False, True))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_one_schedule_serves_every_batch_of_its_capacity(machine):
    """As in a captured graph: rows, prompts and tiles change, sizes and what is launched do not."""
    seen = set()
    for extents, tiles in ((MANY, TILES), (MANY[::-1], []), ([PROMPT] * 22, [list(range(16)), list(range(16, 22))])):
        own = [(i * 7) % 50 for i in range(len(extents))]
        b = batch(extents, own, together=tiles, room=5, columns=4)
        seen.add(tuple(check(machine, b).as_dict().items()))
    assert len(seen) == 1


def test_extents_are_cut_to_the_arena_and_lengths_to_the_table(machine):
    """What a caller gets wrong reads nothing outside: extents as in the Triton kernels, own keys to the table's end."""
    b = batch([(0, 64), (40, 24), NONE], [5, 20, 0])
    wrong = list(b.tensors)
    wrong[8], wrong[9] = torch.tensor([-5, 40, 10**6]).int(), torch.tensor([10**6, 10**6, 5]).int()
    wrong[5] = torch.tensor([5, 20, -7]).int()
    got, _ = run(machine, type(b)(tuple(wrong)))
    want, _ = run(machine, b)
    assert all(torch.equal(got[n], want[n]) for n in got)


@pytest.mark.parametrize("block", range(8))
def test_random_calls(machine, block):
    random = Random(block)
    for _ in range(12):
        b, more = random_case(random)
        check(machine, b, **more)


def test_calls_it_does_not_take(machine):
    b = batch(MIXED, OWN)
    out, lse = torch.empty_like(b.tensors[0]), torch.empty(4, 7)

    def code(on=SMALL, loads=Loads.AUTO, **changed):
        a = arguments(*b.tensors, out, lse, loads=loads)
        for name, value in changed.items():
            setattr(a, name, value)
        found = machine.schedule(a, on)
        return CODES[found] if isinstance(found, int) else "ok"

    assert code() == "ok"
    assert code(dtype=3) == code(prefix_dtype=1) == code(sinks=64, sinks_dtype=2) == "dtype"
    assert code(head_dim=80) == "head_dim"
    assert code(heads=3) == code(heads=34) == code(kv_heads=0) == "heads"
    assert code(k_cache=8) == code(v_slot_stride=4) == code(prefix_dtype=2, prefix_k_token_stride=72) == "alignment"
    assert code(rows=-1) == code(block_size=0) == code(arena_tokens=2**31) == code(max_blocks=2**28) == "sizes"
    assert code(loads=Loads.BULK, on=chip(80, 2)) == "loads"
    assert code(on=chip(75, 2)) == "chip"


def test_no_rows_are_no_work(machine):
    """Whatever tiles a plan brings."""
    b = batch(MIXED, OWN, together=[[0, 3, 6]])
    a = arguments(*b.tensors, torch.empty_like(b.tensors[0]), None, sharing=b.sharing)
    a.rows = 0
    assert (machine.schedule(a, SMALL).blocks, machine.schedule(a, SMALL).workspace_bytes) == (0, 0)
