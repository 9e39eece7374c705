"""Every causal architecture is served right: packed where it can be, padded elsewhere, refused where neither works."""

import pytest
import torch
import zoo
from serving_cases import greedy, run, texts, tokens

import fastprompt as fp
from fastprompt.errors import UnsupportedError
from fastprompt.model import PromptedModel
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.padded import PaddedRunner
from fastprompt.serving.scheduler import Rules

PADDED = {"llama4_text", "gpt_neo", "gptj", "falcon", "falcon_mqa", "bloom", "codegen"}


def _prompts(model, folder):
    configs = {"prefix": fp.PrefixTuning(num_virtual_tokens=6, init_std=1.0)}
    if model._info.path == "none":
        configs = {}
    if model._info.compiles:
        configs["embedding"] = fp.PromptTuning(num_virtual_tokens=4)
    for i, (name, config) in enumerate(configs.items()):
        model.add_prompt(name, config, seed=i)
        model.save_prompt(name, folder / name)
    return [None, *configs]


@pytest.mark.parametrize("name", list(zoo.CAUSAL))
def test_greedy_answers_are_those_of_generate(name, tmp_path):
    model = PromptedModel(zoo.causal(name))
    rows = _prompts(model, tmp_path)
    options = EngineOptions(
        block_size=4, max_model_len=64, device_bytes=2**22, rules=Rules(max_rows=4, max_batch_tokens=9)
    )
    engine = build_engine(zoo.causal(name), tmp_path, options)
    assert isinstance(engine.runner, PaddedRunner) == (name in PADDED)
    requests = [greedy([t % zoo.VOCAB for t in text], rows[i % len(rows)], 8) for i, text in enumerate(texts(7))]
    events = run(engine, requests)
    for request in requests:
        ids = torch.tensor([request.token_ids])
        out = model.generate(ids, prompts=request.prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected = out[0, ids.shape[1] :].tolist()
        expected = expected[:-1] if expected[-1] in engine.limits.end_tokens else expected
        assert tokens(events[request.request_id, 0]) == expected, request.prompt
    engine.residency.close()


def test_encoder_decoders_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        build_engine(zoo.seq2seq(next(iter(zoo.SEQ2SEQ))), tmp_path)
