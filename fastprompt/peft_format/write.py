"""Writing a prompt as a PEFT adapter folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch

from fastprompt.errors import ArgumentError, UnsupportedError
from fastprompt.folders import replace_folder
from fastprompt.peft_format.layout import CONFIG, HEADS, SEQ2SEQ, WEIGHTS, module_of, slot_pair
from fastprompt.prompts import Cartridge, PromptConfig, PromptHead, PTuning, SoftPrompt
from fastprompt.spec import BackboneSpec, LayerShape
from fastprompt.store import check_finite

TASKS = ("CAUSAL_LM", SEQ2SEQ, "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_EXPORTED = {
    "prompt_tuning": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning_v2": "PREFIX_TUNING",
    "cartridge": "CARTRIDGE",
}
_PEFT_VERSION = "0.21.2"  # the release whose layout is written


def write_peft(
    path: str | os.PathLike[str],
    prompt: SoftPrompt,
    *,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `prompt` as an adapter folder that `peft.PeftModel.from_pretrained` loads with equal logits.

    Args:
        task_type: PEFT's name ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", ...); None takes the prompt's own, and failing
            that the language model's.
    Errors: UnsupportedError for a prompt PEFT cannot hold (a method it has not, chosen layers, layers that differ,
    virtual tokens in place); as `save_prompt` for the folder. Nothing is written then.
    """
    task = task_type or prompt.task_type or (SEQ2SEQ if prompt.spec.encoder_decoder else "CAUSAL_LM")
    _check_task(task, prompt)
    if prompt.config.method not in _EXPORTED:
        raise UnsupportedError(
            f"PEFT has no method for {prompt.config.method!r}, expected one of {', '.join(_EXPORTED)}: save the prompt "
            "in fastprompt's format"
        )
    if prompt.in_place:
        raise UnsupportedError(
            "the prompt's virtual tokens stand in place, PEFT's in front of the text: save it in fastprompt's format"
        )
    submodules = 2 if task == SEQ2SEQ else 1
    rows = _slots(prompt, submodules) if prompt.kind == "prefix" else prompt.weights().repeat(submodules, 1)
    modules, heads = _head_tensors(prompt.head)
    tensors = {"prompt_embeddings": rows} | heads
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    check_finite(tensors, ArgumentError, "prompt")
    config = _written_config(prompt) | {
        "task_type": task,
        "base_model_name_or_path": base_model_name_or_path,
        "num_transformer_submodules": submodules,
        "modules_to_save": modules,
    }
    files = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: safetensors_torch.save(tensors, metadata={"format": "pt"}),
    }
    return replace_folder(path, files, overwrite=overwrite, owned=(*files, "README.md"))


def _slots(prompt: SoftPrompt, submodules: int) -> torch.Tensor:
    """The flat prefix in which PEFT finds each layer's keys and values; pairs that no layer reads are zero."""
    spec = prompt.spec
    entered = prompt.config.prefix_layers(spec)
    if (parts := spec.parts_of(entered)) != ("decoder",):
        raise UnsupportedError(
            f"the prompt enters {' and '.join(parts)}, PEFT's prefixes enter an encoder-decoder's decoder only: "
            "save it in fastprompt's format"
        )
    if entered != tuple(range(spec.num_layers)):
        raise UnsupportedError(
            f"the prompt enters layers {list(entered)} of {spec.num_layers}, PEFT's prefixes enter all: save it in "
            "fastprompt's format"
        )
    if len(set(spec.layers)) != 1 or spec.layers[0].key_dim != spec.layers[0].value_dim:
        raise UnsupportedError(
            f"PEFT's prefixes have one shape for all keys and values, {spec.describe()} has several: save it in "
            "fastprompt's format"
        )
    if not spec.encoder_decoder:
        return prompt.weights()
    if submodules != 2:
        raise UnsupportedError(
            f"task_type is not {SEQ2SEQ}, under which alone PEFT keeps an encoder-decoder's prefix out of "
            "cross-attention: save it in fastprompt's format"
        )
    pairs = prompt.weights().unflatten(1, (spec.num_layers, -1))
    count = _written_layers(spec)
    slots = pairs.new_zeros(pairs.shape[0], count, pairs.shape[2])
    slots[:, [slot_pair(i, count) for i in range(spec.num_layers)]] = pairs
    return slots.flatten(1)


def _written_layers(spec: BackboneSpec) -> int:
    """PEFT's `num_layers`: odd for an encoder-decoder, so that no two decoder layers read the same slots."""
    return spec.num_layers | 1 if spec.encoder_decoder else spec.num_layers


def _head_tensors(head: PromptHead | None) -> tuple[list[str] | None, dict[str, torch.Tensor]]:
    """PEFT's `modules_to_save` and the head's tensors by PEFT's names."""
    if head is None:
        return None, {}
    start = f"{head.module}." if head.module else ""
    tensors = {start + name: p for name, p in head.tensors().items()}
    modules = {head.module or module_of(name, HEADS) or name.rpartition(".")[0] for name in tensors}
    return sorted(modules), {f"base_model.{name}": p for name, p in tensors.items()}


def _check_task(task: str, prompt: SoftPrompt) -> None:
    if task not in TASKS:
        raise ArgumentError(f"task_type is {task!r}, expected one of {', '.join(TASKS)}")
    if task == SEQ2SEQ and not prompt.spec.encoder_decoder:
        raise ArgumentError(f"task_type is {task!r} but {prompt.spec.describe()} is no encoder-decoder")
    if task in _WITH_HEAD and prompt.head is None:
        raise ArgumentError(
            f"task_type is {task!r}, for which PEFT loads a head with the prompt, but the prompt has none: set "
            "prompt.head to a PromptHead with the backbone's own head"
        )


def _written_config(prompt: SoftPrompt) -> dict[str, Any]:
    """The fields of `adapter_config.json` that follow from the prompt."""
    spec, kind = prompt.spec, _EXPORTED[prompt.config.method]
    # PEFT looks for absent numbers in the backbone's config, in vain for some: all are given, though only a prefix
    # uses the heads and layers
    shape = spec.layers[0] if spec.layers else LayerShape(1, spec.hidden_size, spec.hidden_size)
    common = {
        "peft_type": kind,
        "peft_version": _PEFT_VERSION,
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": prompt.length,
        "num_layers": _written_layers(spec),
        "num_attention_heads": shape.kv_heads,
        "token_dim": shape.kv_heads * shape.key_dim if prompt.kind == "prefix" else spec.hidden_size,
    }
    return common | _method_fields(prompt.config, spec)


def _method_fields(config: PromptConfig, spec: BackboneSpec) -> dict[str, Any]:
    if isinstance(config, Cartridge):
        return {"num_frozen_tokens": config.num_frozen_tokens}
    if isinstance(config, PTuning):
        hidden = config.encoder_hidden_size or spec.hidden_size
        return {
            "encoder_reparameterization_type": "MLP" if config.encoder == "mlp" else "LSTM",
            "encoder_hidden_size": hidden // 2 if config.encoder == "lstm" else hidden,
            "encoder_num_layers": 2 if config.encoder == "mlp" else config.encoder_layers,
            "encoder_dropout": config.encoder_dropout,
        }
    if config.kind == "prefix":  # flat keys and values, whatever trained them
        return {"encoder_hidden_size": None, "prefix_projection": False, "init_weights": None}
    init = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    return init | {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}
