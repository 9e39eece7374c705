"""What decoding costs by each path: what is counted, tables of it, and the choice that follows."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt import costs
from fastprompt.costs import Decode
from fastprompt.errors import ArgumentError
from fastprompt.plan import BatchPlan

(COUNTED,) = costs.load()
TOKEN = 2 * 8 * 128 * 2  # bytes of keys and values with 8 heads of 128
STATE = 2 * 32 * 129 * 4  # of a partial result with 32 heads, written and read
PATH = st.sampled_from(sorted(costs.PATHS))


def shapes():
    sizes = st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9000), st.integers(1, 4000))
    return sizes.map(lambda n: Decode(max(n[:2]), min(n[:2]), *n[2:]))


@pytest.mark.parametrize("path", ["cuda", "triton"])
def test_bytes_of_a_step_are_those_counted_by_hand(path):
    shape = Decode(128, 8, 256, 512)
    together, alone = shape.work(path, True), shape.work(path, False)
    assert together.unique == alone.unique == TOKEN * (8 * 256 + 128 * 512) + 2 * 128 * 32 * 128 * 2
    assert (together.again, alone.again) == (0, TOKEN * 120 * 256)
    assert (together.states, alone.states) == (3 * 128 * STATE, 0)  # a prefix in two parts, and own keys
    assert (together.launches, alone.launches) == (2, 1)


def test_a_long_prefix_of_few_rows_is_cut_into_parts():
    work = Decode(1, 1, 8192, 64).work("single", False)
    assert work.states == 16 * STATE and work.launches == 2


def test_each_path_cuts_keys_into_parts_of_its_own():
    """Those of kernels/triton and csrc/cuda; the latter's schedule is held to them in tests/cuda."""
    shape = Decode(1, 1, 0, 1500)
    assert [shape.work(path, False).states // STATE for path in ("cuda", "triton", "single")] == [2, 5, 5]
    assert Decode(1, 1, 0, 511).work("cuda", False) == Decode(1, 1, 0, 511).work("triton", False)


@given(shapes(), PATH)
def test_sharing_reads_no_more_and_keeps_more(shape, path):
    together, alone = shape.work(path, True), shape.work(path, False)
    assert together.unique == alone.unique and 0 <= together.again <= alone.again and together.states > 0
    assert alone.again == 0 or shape.prompts < shape.rows


@given(shapes(), st.sampled_from(["rows", "prefix", "own"]), PATH, st.booleans())
def test_more_of_anything_reads_more(shape, what, path, shared):
    more = replace(shape, **{what: getattr(shape, what) + 16})
    larger, usual = more.work(path, shared), shape.work(path, shared)
    assert larger.unique > usual.unique or what == "prefix"
    assert larger.again >= usual.again or what == "rows"


@given(shapes(), PATH, st.booleans())
def test_time_grows_with_every_weight(shape, path, shared):
    work = shape.work(path, shared)
    usual = COUNTED.microseconds(path, work)
    assert usual > 0
    for name in ("launch_us", "unique", "again", "states"):
        weights = replace(COUNTED.paths[path], **{name: 2 * getattr(COUNTED.paths[path], name)})
        dearer = replace(COUNTED, paths=COUNTED.paths | {path: weights})
        assert dearer.microseconds(path, work) >= usual


@given(shapes(), st.booleans())
def test_the_counted_table_prefers_cuda_as_it_cannot_tell(shape, shared):
    assert costs.cheaper_than_cuda(COUNTED, shape, shared) is None


def test_a_table_that_can_tell_decides():
    slow = replace(COUNTED, paths=COUNTED.paths | {"cuda": replace(COUNTED.paths["cuda"], unique=1.5)})
    said = costs.cheaper_than_cuda(slow, Decode(128, 8, 256, 512), True)
    assert said == "the cost table says 64.8 us for Triton and 93.8 us for CUDA"


def test_the_plan_follows_the_tables_rules(monkeypatch):
    shape = Decode(128, 8, 256, 512)

    def shared():
        return BatchPlan.build(*shape.extents(), queries=[1] * 128).sharing is not None

    assert shared()
    monkeypatch.setattr(costs, "table", lambda device: replace(COUNTED, state_tokens=250))
    assert not shared()
    monkeypatch.setattr(costs, "table", lambda device: replace(COUNTED, least_saving=10**6))
    assert not shared()


def test_the_rules_of_the_counted_table_are_its_weights():
    """A row that shares has about four states; a launch, what is read again while it lasts."""
    weights = COUNTED.paths["triton"]
    again = TOKEN * weights.again
    assert COUNTED.state_tokens == pytest.approx(4 * STATE * weights.states / again, rel=0.05)
    assert COUNTED.least_saving == pytest.approx(weights.launch_us * COUNTED.memory_gbs * 1e3 / again, rel=0.2)


def test_extents_are_prompts_side_by_side():
    assert Decode(5, 2, 7, 1).extents() == ([0, 0, 0, 7, 7], [7] * 5)


def test_a_shape_is_read_from_words():
    assert Decode.parse(costs.EXAMPLE) == Decode(128, 8, 256, 512)
    assert Decode.parse("rows=4, prompts=2, P=9, S=1, heads=6/3, D=64, bytes=4") == Decode(4, 2, 9, 1, 6, 3, 64, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=4 prompts=2 P=9", "lacks S"),
        ("rows=4 prompts=2 P=9 S=1 heads=6", "has 'heads=6'"),
        ("rows=4 prompts=2 P=9 S=1 Q=6", "has 'Q=6'"),
        ("rows=4 prompts=two P=9 S=1", "has 'prompts=two'"),
        ("rows=4 prompts=5 P=9 S=1", "4 rows of 5 prompts"),
        ("rows=4 prompts=0 P=9 S=1", "4 rows of 0 prompts"),
        ("rows=4 prompts=2 P=9 S=1 heads=6/4", "6 heads over 4"),
    ],
)
def test_what_is_no_shape_is_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        Decode.parse(text)


@pytest.fixture
def given_file(monkeypatch, tmp_path):
    """Writes tables for FASTPROMPT_COSTS."""
    path = tmp_path / "costs.json"
    monkeypatch.setenv("FASTPROMPT_COSTS", str(path))
    costs._named.cache_clear()
    yield lambda text: path.write_text(text)
    costs._named.cache_clear()


def test_another_file_may_be_named(given_file):
    entry = json.loads((costs.resources.files("fastprompt") / "costs.json").read_text())["tables"][0]
    ours = entry | {"device": "A GPU", "measured": True}
    given_file(json.dumps({"tables": [ours, entry | {"memory_gbs": 1}]}))
    assert costs.table("cpu").memory_gbs == 1
    assert costs._named("A GPU").measured and not costs._named("another").measured


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"tables": []}', '{"tables": [{"device": null}]}'])
def test_a_file_that_is_none_is_refused(given_file, text):
    given_file(text)
    with pytest.raises(ArgumentError, match="cost table"):
        costs.table("cpu")
