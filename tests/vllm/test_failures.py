"""Prompts that are not there, or not whole: their requests fail, the engine lives, and no page is stale."""

import pytest
import vllm_cases
from vllm_cases import engine, generate, tokens, writer

from fastprompt import PrefixTuning
from fastprompt.errors import PromptNotFoundError
from fastprompt.integrations.vllm import PromptedInputs

NEW = 8
TEXT = (1, 44, 55, 66)
LONG, OTHER = tuple(range(100, 170)), tuple(range(200, 270))  # more than a page behind the prompt


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One engine for all of these: what a test breaks it puts right, or breaks for good under a name of its own."""
    served = vllm_cases.serve(tmp_path_factory.mktemp("two"), lengths=())
    for seed, name in enumerate(("good", "bad", "replaced", "deleted")):
        served.add(name, PrefixTuning(num_virtual_tokens=40), seed=seed)
    served.add("paged", PrefixTuning(num_virtual_tokens=64), seed=9)
    served.export()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPROMPT_VLLM_SECRET", vllm_cases.SECRET)
        with engine(served) as llm:
            yield served, llm


@pytest.fixture
def two(running):
    return running[0]


@pytest.fixture
def llm(running):
    running[1].reset_prefix_cache()
    return running[1]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_or_missing_prefix_fails_its_requests_alone(two, llm):
    good, bad = two.expected([("good", TEXT), ("bad", TEXT)], NEW)
    path = two.store._prefix_path(two.store.current("bad").digest)
    whole = path.read_bytes()
    harms = {
        "truncated": lambda: path.write_bytes(whole[:100]),
        "empty": lambda: path.write_bytes(b""),
        "altered": lambda: path.write_bytes(flip(whole)),
        "removed": lambda: path.unlink(),
    }
    inputs = PromptedInputs.of(llm)
    batch = [inputs("good", TEXT), inputs("bad", TEXT), inputs("good", TEXT[:2]), inputs("bad", TEXT)]
    for before in ("never read", "read before"):  # so that a mapping of the file is at hand
        for name, harm in harms.items():
            harm()
            outputs = generate(llm, batch, NEW)
            assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length", "error"], name
            assert tokens(outputs)[0] == good, (before, name)
            path.write_bytes(whole)
            outputs = generate(llm, batch, NEW)  # whole again: nothing wrong was kept
            assert tokens(outputs)[:2] == [good, bad], (before, name)
            llm.reset_prefix_cache()
    assert writer().stats.failed == 2 * 2 * len(harms)


def test_what_was_computed_behind_pages_that_were_not_loaded_is_forgotten(two, llm):
    """Requests of one step share the pages of a prefix; a client may go away before it turns out that they are bad."""
    from vllm import SamplingParams

    good = two.expected([("paged", text) for text in (LONG, OTHER)], NEW)
    both = [PromptedInputs.of(llm)("paged", text) for text in (LONG, OTHER)]
    prefixes, core = writer().prefixes, llm.llm_engine.engine_core.engine_core
    original = prefixes.get

    def fail(digest):
        raise OSError("stale file handle")

    def fail_late(digest):
        core.aborts_queue.put_nowait(list(core.scheduler.requests))
        fail(digest)

    prefixes.get = fail
    failed = generate(llm, both, NEW)
    assert [output.outputs[0].finish_reason for output in failed] == ["error"] * 2
    prefixes.get = original
    for _ in range(2):
        assert tokens(generate(llm, both, NEW)) == good

    llm.reset_prefix_cache()
    prefixes.get = fail_late
    for number, request in enumerate(both):
        llm.llm_engine.add_request(str(number), request, SamplingParams(max_tokens=NEW))
    llm.llm_engine.step()
    assert not core.scheduler.requests
    llm.llm_engine.abort_request(["0", "1"])
    prefixes.get = original
    for _ in range(2):
        assert tokens(generate(llm, both, NEW)) == good


def test_a_backend_that_fails_fails_the_requests_of_its_step(two, llm):
    good = two.expected([("good", TEXT)], NEW)
    inputs = PromptedInputs.of(llm)
    held = writer()
    layers, held.layers = held.layers, {"no such layer": 0}
    outputs = generate(llm, [inputs("good", TEXT), inputs(None, TEXT)], NEW)
    assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length"]
    held.layers = layers
    assert tokens(generate(llm, [inputs("good", TEXT)], NEW)) == good


def test_a_replaced_prompt_is_never_answered_from_old_pages(two, llm):
    inputs = PromptedInputs.of(llm)
    (old,) = two.expected([("replaced", TEXT)], NEW)
    before = inputs("replaced", TEXT)
    assert tokens(generate(llm, [before], NEW)) == [old]
    two.add("replaced", PrefixTuning(num_virtual_tokens=40), seed=9, overwrite=True)
    two.export()  # without a restart
    (new,) = two.expected([("replaced", TEXT)], NEW)
    assert new != old
    assert tokens(generate(llm, [inputs("replaced", TEXT), before], NEW)) == [new, old]  # who asked before gets that
    two.add("fresh", PrefixTuning(num_virtual_tokens=7), seed=10)
    two.export()
    assert tokens(generate(llm, [inputs("fresh", TEXT)], NEW)) == two.expected([("fresh", TEXT)], NEW)


def test_an_unknown_or_deleted_prompt_is_no_request(two, llm):
    inputs = PromptedInputs.of(llm)
    before = inputs("deleted", TEXT)
    with pytest.raises(PromptNotFoundError, match="'nobody' is not in"):
        inputs("nobody", TEXT)
    two.store.remove_name("deleted")
    with pytest.raises(PromptNotFoundError, match="'deleted' is not in"):
        inputs("deleted", TEXT)
    assert two.store.collect(grace_seconds=-1) > 0
    outputs = generate(llm, [before, inputs("good", TEXT)], NEW)
    assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length"]
