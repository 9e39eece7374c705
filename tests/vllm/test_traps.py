"""Ways in which pages of one prompt could answer for another: each happens without the hardening, and not with it."""

from contextlib import contextmanager

import pytest
import vllm_cases
from vllm_cases import connector_options, engine, generate, tokens

from fastprompt import PrefixTuning
from fastprompt.integrations.vllm import PromptedInputs

NEW = 8
TEXT = (1, 44, 55, 66)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Two prefixes of 64 virtual tokens, of which no answer is the other's, nor the bare backbone's."""
    served = vllm_cases.serve(tmp_path_factory.mktemp("twins"), lengths=())
    served.add("a", PrefixTuning(num_virtual_tokens=64), seed=1)
    served.add("b", PrefixTuning(num_virtual_tokens=64), seed=2)
    served.export()
    return served


@contextmanager
def unhardened(twins, connector="Unhardened"):
    options = connector_options(twins)["kv_transfer_config"]
    other = {"kv_connector": connector, "kv_connector_module_path": "vllm_unhardened"}
    with engine(twins, kv_transfer_config=options | other) as llm:
        yield llm


def unsealed(twins, name, salt=None):
    """A request as the first prototype made it: equal placeholders, the prompt in the transfer parameters."""
    ticket = twins.store.current(name).ticket
    made = {"prompt_token_ids": [0] * ticket.length + list(TEXT)} | ({"cache_salt": salt} if salt else {})
    return made, {"kv_transfer_params": {"fastprompt": [ticket.digest, ticket.length]}}


def ask(llm, twins, name, salt=None, params=True, **more):
    made, extra = unsealed(twins, name, salt)
    return tokens(generate(llm, [made], NEW, extra_args=extra if params else None, **more))[0]


def test_without_hardening_each_trap_is_one(twins):
    a, b = twins.expected([("a", TEXT), ("b", TEXT)], NEW)
    assert a != b
    import vllm

    skips = tuple(map(int, vllm.__version__.split(".")[:2])) >= (0, 31)  # before, it asked connectors all the same
    with unhardened(twins) as llm:
        assert ask(llm, twins, "a") == a
        assert ask(llm, twins, "b") == a  # 1: no salt, equal placeholders: a's pages answer for b
        llm.reset_prefix_cache()
        if skips:
            assert ask(llm, twins, "a", "salt of a", prompt_logprobs=1) != a  # 2: no caches are read, nor the prefix,
            assert ask(llm, twins, "a", "salt of a") != a  # and what was computed instead stays
        llm.reset_prefix_cache()
        assert ask(llm, twins, "a", "salt of a", params=False) != a  # 2: so does what came without parameters
        assert ask(llm, twins, "a", "salt of a") != a


def test_without_hardening_an_exception_ends_the_engine(twins):
    with unhardened(twins, "Raising") as llm:
        inputs = PromptedInputs.of(llm)
        request = inputs("b", TEXT)
        path = twins.store._prefix_path(twins.store.current("b").digest)
        whole = path.read_bytes()
        path.write_bytes(b"nothing")
        try:
            with pytest.raises(Exception, match="digest"):
                generate(llm, [request], NEW)  # which an engine in a process of its own does not survive
        finally:
            path.write_bytes(whole)


def test_hardened_no_request_gets_pages_of_another(twins):
    a, b, bare = twins.expected([("a", TEXT), ("b", TEXT), (None, TEXT)], NEW)
    with engine(twins) as llm:
        inputs = PromptedInputs.of(llm)
        good = {name: inputs(name, TEXT) for name in ("a", "b")}

        def answers():
            return tokens(generate(llm, [good["a"], good["b"], inputs(None, TEXT)], NEW))

        assert answers() == [a, b, bare]
        # 1: transfer parameters say nothing; placeholders without a salt are text like any other
        assert ask(llm, twins, "b") not in (a, b)
        naked = {"prompt_token_ids": good["a"]["prompt_token_ids"]}
        assert tokens(generate(llm, [naked], NEW))[0] != a
        assert answers() == [a, b, bare]
        # 2: a request for the prompt's log-probabilities fails, and leaves no pages
        llm.reset_prefix_cache()
        assert failed(generate(llm, [good["a"], good["b"]], NEW, prompt_logprobs=1)) == ["error", "error"]
        assert answers() == [a, b, bare]
        llm.reset_prefix_cache()
        assert tokens(generate(llm, [good["a"]], NEW, skip_reading_prefix_cache=True))[0] == a
        assert answers() == [a, b, bare]


def failed(outputs):
    return [output.outputs[0].finish_reason for output in outputs]


def test_hardened_a_request_that_claims_a_prompt_wrongly_fails_alone(twins):
    """Seals of another server, of another prompt, and requests that do not begin as their salt says."""
    a, b = twins.expected([("a", TEXT), ("b", TEXT)], NEW)
    with engine(twins) as llm:
        inputs = PromptedInputs.of(llm)
        good = {name: inputs(name, TEXT) for name in ("a", "b")}
        other_server = PromptedInputs.of(llm, secret="x" * 32)("a", TEXT)
        wrong = [
            other_server,
            good["a"] | {"cache_salt": good["a"]["cache_salt"][:-1] + "0"},
            good["a"] | {"cache_salt": "fp1-"},
            good["a"] | {"cache_salt": good["b"]["cache_salt"]},
            good["a"] | {"prompt_token_ids": [0] * 64 + list(TEXT)},
            good["a"] | {"prompt_token_ids": good["a"]["prompt_token_ids"][:64]},
        ]
        outputs = generate(llm, [good["a"], *wrong, good["b"]], NEW)
        assert tokens([outputs[0], outputs[-1]]) == [a, b]
        assert failed(outputs[1:-1]) == ["error"] * len(wrong)
        assert tokens(generate(llm, [good["b"], good["a"]], NEW)) == [b, a]
        # of one token there is none that could fail to load: it is text like any other, under a salt that opens nothing
        alone, bare = {"prompt_token_ids": [44]}, twins.expected([(None, (44,))], 64)
        assert tokens(generate(llm, [alone | {"cache_salt": other_server["cache_salt"]}], 64)) == bare
        assert tokens(generate(llm, [good["a"], alone], 64)) == twins.expected([("a", TEXT), (None, (44,))], 64)
