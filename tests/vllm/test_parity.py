"""vLLM with prompts in its pages says what transformers says with prompts in attention."""

import random

import pytest
import vllm_cases
from vllm_cases import LENGTHS, Served, engine, generate, tokens, writer

from fastprompt.integrations.vllm import PromptedInputs

NEW = 12
Rows = list[tuple[str | None, tuple[int, ...]]]


def rows(names: list[str], count: int, seed: int = 0) -> Rows:
    """(prompt, text) pairs: every prompt and the bare backbone, texts of 1 to 90 tokens, some of them equal."""
    draw = random.Random(seed)
    texts = [(1, *(draw.randrange(3, 400) for _ in range(length - 1))) for length in (1, 2, 7, 31, 32, 33, 90)]
    return [([None, *names][i % (len(names) + 1)], draw.choice(texts)) for i in range(count)]


def agree(served: Served, llm: object, wanted: Rows, expected: list[list[int]]) -> list[object]:
    inputs = PromptedInputs.of(llm)
    outputs = generate(llm, [inputs(name, text) for name, text in wanted], NEW)
    wrong = [
        (name, len(text))
        for (name, text), got, want in zip(wanted, tokens(outputs), expected, strict=True)
        if got != want
    ]
    assert not wrong
    return outputs


@pytest.fixture(scope="module")
def mixed(served: Served) -> tuple[Rows, list[list[int]]]:
    wanted = rows(served.names, 300)
    assert {name for name, _ in wanted} == {None, *(f"{k}{n}" for k in ("prefix", "compiled", "p") for n in LENGTHS)}
    return wanted, served.expected(wanted, NEW)


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_300_mixed_requests_in_chunks(served, mixed, caching):
    """64 tokens a step: texts and the tails of prefixes come in pieces."""
    wanted, expected = mixed
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 32, "max_model_len": 448}
    with engine(served, enable_prefix_caching=caching, **options) as llm:
        agree(served, llm, wanted, expected)
        first = writer().stats.tokens
        outputs = agree(served, llm, wanted, expected)
        again = writer().stats.tokens - first
    whole = sum(int(name.lstrip("prefixcomld")) for name, _ in wanted if name)
    if caching:  # what is written again are tails that share a page with text, and prefixes whose pages were taken
        assert first < whole and again < first
    else:
        assert first == again == whole
    assert all(output.num_cached_tokens >= 0 for output in outputs)


def test_preemption_in_a_small_cache(served, mixed):
    """Pages for a few rows only: rows lose theirs on the way and come back."""
    wanted, expected = mixed
    with engine(served, kv_cache_memory_bytes=3 << 20, max_num_seqs=64, max_model_len=448) as llm:
        preempted = []
        held = vllm_cases.scheduler(llm)
        original = held._preempt_request

        def preempt(request, *args, **kwargs):
            preempted.append(request.cache_salt)
            return original(request, *args, **kwargs)

        held._preempt_request = preempt
        agree(served, llm, wanted, expected)
    assert len([salt for salt in preempted if salt]) >= 5


def test_many_heads(tmp_path):
    """Multi-head attention: as many key heads as query heads."""
    mha = vllm_cases.serve(tmp_path, "mha", (1, 20, 64))
    wanted = rows(mha.names, 60, seed=1)
    with engine(mha) as llm:
        agree(mha, llm, wanted, mha.expected(wanted, NEW))


def test_two_ranks(served, mixed, monkeypatch):
    """Tensor parallelism: each rank writes its heads."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    wanted, expected = mixed
    with engine(served, tensor_parallel_size=2) as llm:
        agree(served, llm, wanted, expected)
