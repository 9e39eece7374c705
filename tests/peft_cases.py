"""Adapters of PEFT on tiny backbones, and what PEFT makes of them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
import zoo
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from fastprompt.prompts import SoftPrompt
from fastprompt.spec import BackboneSpec, LayerShape, Prefix

LENGTH = 5
GQA, MHA = LayerShape(2, 8, 8), LayerShape(4, 8, 8)


def spec(model_type: str, layers: int, shape: LayerShape = MHA, causal: bool = True, seq2seq: bool = False):
    return BackboneSpec(model_type, 32, zoo.VOCAB, (shape,) * layers, causal, seq2seq)


# name -> (make a backbone, its spec, PEFT's task)
BACKBONES = {
    "llama": (lambda: zoo.causal("llama"), spec("llama", 3, GQA), "CAUSAL_LM"),
    "gpt2": (lambda: zoo.causal("gpt2"), spec("gpt2", 3), "CAUSAL_LM"),
    "bert": (lambda: zoo.encoder("bert"), spec("bert", 3, causal=False), "SEQ_CLS"),
    "roberta": (lambda: zoo.encoder("roberta"), spec("roberta", 3, causal=False), "SEQ_CLS"),
    "bert_token": (lambda: zoo.encoder("bert", "token_cls"), spec("bert", 3, causal=False), "TOKEN_CLS"),
    "bert_qa": (lambda: zoo.encoder("bert", "qa"), spec("bert", 3, causal=False), "QUESTION_ANS"),
    "t5": (lambda: zoo.seq2seq("t5"), spec("t5", 2, seq2seq=True), "SEQ_2_SEQ_LM"),
    "t5_odd": (
        lambda: zoo.seq2seq("t5", num_layers=3, num_decoder_layers=3),
        spec("t5", 3, seq2seq=True),
        "SEQ_2_SEQ_LM",
    ),
    "t5_deep_encoder": (lambda: zoo.seq2seq("t5", num_layers=5), spec("t5", 2, seq2seq=True), "SEQ_2_SEQ_LM"),
    "bart": (lambda: zoo.seq2seq("bart"), spec("bart", 2, seq2seq=True), "SEQ_2_SEQ_LM"),
}
ADAPTERS = {
    "prompt": PromptTuningConfig,
    "lstm": functools.partial(PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_hidden_size=7),
    "mlp": functools.partial(PromptEncoderConfig, encoder_hidden_size=7),
    "prefix": PrefixTuningConfig,
    "projected": functools.partial(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=7),
    "cartridge": functools.partial(CartridgeConfig, num_frozen_tokens=2),
    "multitask": functools.partial(MultitaskPromptTuningConfig, num_tasks=3, num_ranks=2),
}
PREFIXES = ("prefix", "projected", "cartridge")
PAIRS = [(b, a) for b in BACKBONES for a in ADAPTERS]


def adapt(backbone: str, adapter: str) -> PeftModel:
    """A backbone with a PEFT adapter (and head) of large random parameters."""
    make, _, task = BACKBONES[backbone]
    model = get_peft_model(make(), ADAPTERS[adapter](task_type=task, num_virtual_tokens=LENGTH)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name or parameter.requires_grad:
                parameter.normal_(0.0, 0.5)
    return model


def saved(model: PeftModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


@torch.no_grad()
def used(model: PeftModel, task: int = 0) -> torch.Tensor | list[tuple[torch.Tensor, torch.Tensor]]:
    """What PEFT gives the backbone: `[rows, E]`, or a key and value `[H, P, D]` a layer."""
    prompt = model.get_prompt(1, task_ids=torch.tensor([task]))
    if isinstance(prompt, torch.Tensor):
        return prompt[0]
    cache = getattr(prompt, "self_attention_cache", prompt)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def check_equal(prompt: SoftPrompt, peft: torch.Tensor | list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    # the MLP and LSTM round otherwise for one row than for a batch: a few float32 steps
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        ours = prompt.eval()()
    if isinstance(ours, Prefix):
        for i, key, value in zip(ours.layers, ours.keys, ours.values, strict=True):
            close(key, peft[i][0])
            close(value, peft[i][1])
    else:
        close(ours, peft[:LENGTH])


@torch.no_grad()
def logits(model: torch.nn.Module, **extra) -> torch.Tensor:
    """Logits of the text's positions; for an encoder-decoder those of four generated tokens, greedily."""
    ids = torch.arange(3, 14)[None]
    if model.config.is_encoder_decoder:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
        return torch.cat(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **extra).logits)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    if "logits" not in out:
        return torch.cat([out.start_logits, out.end_logits])[:, -ids.shape[1] :]
    return out.logits if out.logits.dim() == 2 else out.logits[:, -ids.shape[1] :]


def works_in_peft(backbone: str, adapter: str) -> bool:
    if adapter in PREFIXES:
        return True
    # the token head's labels are not extended, and the multitask prompt has no question answering
    return backbone != "bert_token" and (backbone, adapter) != ("bert_qa", "multitask")
