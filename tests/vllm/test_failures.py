"""Prompts that are not there, or not whole: their requests fail, the engine lives, and no page is stale."""

import pytest
import vllm_cases
from vllm_cases import engine, generate, tokens, writer

from fastprompt import PrefixTuning
from fastprompt.errors import PromptNotFoundError
from fastprompt.integrations.vllm import PromptedInputs

NEW = 8
TEXT = (1, 44, 55, 66)


@pytest.fixture
def two(tmp_path):
    served = vllm_cases.serve(tmp_path, lengths=())
    served.add("good", PrefixTuning(num_virtual_tokens=40), seed=1)
    served.add("bad", PrefixTuning(num_virtual_tokens=40), seed=2)
    served.export()
    return served


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_damaged_or_missing_prefix_fails_its_requests_alone(two):
    good, bad = two.expected([("good", TEXT), ("bad", TEXT)], NEW)
    path = two.store._prefix_path(two.store.current("bad").digest)
    whole = path.read_bytes()
    harms = {
        "truncated": lambda: path.write_bytes(whole[:100]),
        "empty": lambda: path.write_bytes(b""),
        "altered": lambda: path.write_bytes(flip(whole)),
        "removed": lambda: path.unlink(),
    }
    with engine(two) as llm:
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


def test_a_backend_that_fails_fails_the_requests_of_its_step(two):
    good = two.expected([("good", TEXT)], NEW)
    with engine(two) as llm:
        inputs = PromptedInputs.of(llm)
        held = writer()
        layers, held.layers = held.layers, {"no such layer": 0}
        outputs = generate(llm, [inputs("good", TEXT), inputs(None, TEXT)], NEW)
        assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length"]
        held.layers = layers
        assert tokens(generate(llm, [inputs("good", TEXT)], NEW)) == good


def test_a_replaced_prompt_is_never_answered_from_old_pages(two):
    with engine(two) as llm:
        inputs = PromptedInputs.of(llm)
        (old,) = two.expected([("good", TEXT)], NEW)
        before = inputs("good", TEXT)
        assert tokens(generate(llm, [before], NEW)) == [old]
        two.add("good", PrefixTuning(num_virtual_tokens=40), seed=9, overwrite=True)
        two.export()  # without a restart
        (new,) = two.expected([("good", TEXT)], NEW)
        assert new != old
        assert tokens(generate(llm, [inputs("good", TEXT), before], NEW)) == [new, old]  # who asked before gets that
        two.add("fresh", PrefixTuning(num_virtual_tokens=7), seed=10)
        two.export()
        assert tokens(generate(llm, [inputs("fresh", TEXT)], NEW)) == two.expected([("fresh", TEXT)], NEW)


def test_an_unknown_or_deleted_prompt_is_no_request(two):
    with engine(two) as llm:
        inputs = PromptedInputs.of(llm)
        before = inputs("bad", TEXT)
        with pytest.raises(PromptNotFoundError, match="'nobody' is not in"):
            inputs("nobody", TEXT)
        two.store.remove_name("bad")
        with pytest.raises(PromptNotFoundError, match="'bad' is not in"):
            inputs("bad", TEXT)
        assert two.store.collect(grace_seconds=-1) == 1
        outputs = generate(llm, [before, inputs("good", TEXT)], NEW)
        assert [o.outputs[0].finish_reason for o in outputs] == ["error", "length"]
