"""Every way to decode still decodes with prompts: caches, compiled steps, beams, assistants, sampling."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import zoo
from feature_cases import GREEDY, ROWS, padded, prompted
from transformers import CompileConfig, DynamicCache


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return padded()


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral_window", "gemma2", "gemma3_text", "gpt_oss", "opt", "deepseek_v3"]
)
def test_static_cache_gives_the_same_tokens(name: str, inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal(name))
    dynamic = model.generate(**inputs, prompts=ROWS, **GREEDY)
    static = model.generate(**inputs, prompts=ROWS, cache_implementation="static", **GREEDY)
    assert static.tolist() == dynamic.tolist()


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2"])
def test_generate_under_torch_compile(name: str, inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal(name))
    expected = model.generate(**inputs, prompts=ROWS, **GREEDY)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # transformers compiles on a GPU only, unless told
    options = dict(cache_implementation="static", compile_config=compiling, **GREEDY)
    with mock.patch.object(torch, "compile", wraps=torch.compile) as compile_calls:
        compiled = model.generate(**inputs, prompts=ROWS, **options)
    assert compile_calls.called
    assert compiled.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_beams_equal_alone(name: str, inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal(name))
    options = GREEDY | dict(num_beams=3, num_return_sequences=2)
    mixed = model.generate(**inputs, prompts=ROWS, **options)
    for b, row in enumerate(ROWS):
        text = inputs["input_ids"][b : b + 1, inputs["attention_mask"][b].bool()]
        alone = model.generate(input_ids=text, attention_mask=torch.ones_like(text), prompts=[row], **options)
        assert mixed[2 * b : 2 * b + 2, -10:].tolist() == alone[:, -10:].tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
def test_beams_of_an_encoder_decoder(name: str) -> None:
    model = prompted(zoo.seq2seq(name))
    ids = torch.randint(3, zoo.VOCAB, (4, 9))
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    mixed = model.generate(input_ids=ids, prompts=ROWS, **options)
    for b, row in enumerate(ROWS):
        assert mixed[b].tolist() == model.generate(input_ids=ids[b : b + 1], prompts=[row], **options)[0].tolist()


@pytest.mark.parametrize("assistant_prompted", [False, True])
def test_assisted_generation_is_greedy_generation(assistant_prompted: bool) -> None:
    model = prompted(zoo.causal("llama"))
    ids = torch.randint(3, zoo.VOCAB, (1, 8))
    assistant: Any = zoo.causal("llama", seed=4, num_hidden_layers=2, num_key_value_heads=4)
    if assistant_prompted:
        assistant = prompted(assistant)
    for row in ("prefix", "embed", None):
        expected = model.generate(input_ids=ids, prompts=[row], **GREEDY)
        got = model.generate(input_ids=ids, prompts=[row], assistant_model=assistant, **GREEDY)
        assert got.tolist() == expected.tolist()


def test_sampling_is_reproducible(inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal("llama"))
    options = GREEDY | dict(do_sample=True, temperature=0.8, top_p=0.9)
    torch.manual_seed(3)
    first = model.generate(**inputs, prompts=ROWS, **options)
    torch.manual_seed(3)
    assert model.generate(**inputs, prompts=ROWS, **options).tolist() == first.tolist()


def test_no_cache_and_stepwise_cache_agree(inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal("llama"))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(**inputs, prompts=ROWS, use_cache=False).logits
        cache = DynamicCache()
        first = model(input_ids=ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache, prompts=ROWS)
        assert cache.get_seq_length() == 7  # own tokens only
        rest = model(input_ids=ids[:, 7:], attention_mask=mask, past_key_values=cache, prompts=ROWS)
    steps = torch.cat([first.logits, rest.logits], dim=1)
    real = mask.bool()
    torch.testing.assert_close(steps[real], whole[real], rtol=1e-4, atol=1e-5)
