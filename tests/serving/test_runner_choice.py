"""A backbone runs packed only if no row can reach another one by any way, in any dtype."""

import pytest
import torch
import transformers as tf
import zoo
from serving_cases import greedy, run, texts, tokens

from fastprompt.model import PromptedModel
from fastprompt.serving.build import EngineOptions, build_engine
from fastprompt.serving.padded import PaddedRunner
from fastprompt.serving.runner import PackedRunner
from fastprompt.serving.scheduler import Rules

MIXED = {  # attention beside convolutions or recurrences over the tokens, which carry what packed rows must not share
    "lfm2": lambda: tf.Lfm2Config(**zoo._DECODER, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8),
    "falcon_h1": lambda: tf.FalconH1Config(
        **zoo._DECODER, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **zoo._DECODER, lru_width=32, attention_window_size=64, block_types=["recurrent", "attention", "recurrent"]
    ),
}


def _mixed(name, dtype=torch.float32):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(MIXED[name]()).to(dtype).eval()


def _engine(model, folder):
    options = EngineOptions(
        block_size=4, max_model_len=64, device_bytes=2**22, rules=Rules(max_rows=4, max_batch_tokens=9)
    )
    return build_engine(model, folder, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MIXED))
def test_tokens_that_meet_outside_of_attention_run_padded(name, dtype, tmp_path, caplog):
    made = _engine(_mixed(name, dtype), tmp_path)
    made.residency.close()
    assert isinstance(made.runner, PaddedRunner) and "runs padded" in caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "opt", "mixtral"])
def test_attention_alone_runs_packed_in_low_precision(name, tmp_path):
    made = _engine(zoo.causal(name).to(torch.bfloat16), tmp_path)
    made.residency.close()
    assert isinstance(made.runner, PackedRunner)


def test_mixed_backbones_answer_as_alone(tmp_path):
    made, model = _engine(_mixed("lfm2"), tmp_path), PromptedModel(_mixed("lfm2"))
    requests = [greedy([t % zoo.VOCAB for t in text], None, 6) for text in texts(5)]
    events = run(made, requests)
    made.residency.close()
    for request in requests:
        ids = torch.tensor([request.token_ids])
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert tokens(events[request.request_id, 0]) == (out[:-1] if out[-1] in made.limits.end_tokens else out)


@pytest.mark.parametrize("name", list(MIXED))
def test_they_do_not_compile_embedding_prompts(name):
    """A prefix would leave out what convolutions and recurrences carry from the prompt to the text."""
    assert not PromptedModel(_mixed(name))._info.compiles
